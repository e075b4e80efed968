"""A tokenizer as keys of a GGUF file; `text.gguf_vocab` reads them.

Key names and token types: the GGUF specification in the ggml repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kuiperllm.errors import UnsupportedError
from kuiperllm.text.byte_level import Family
from kuiperllm.text.pipeline import PipelineTokenizer
from kuiperllm.text.spm_model import BPE, PieceType, SpmModel
from kuiperllm.text.tokenizer import Tokenizer
from kuiperllm.text.writing.spm import spm_model_of

_PRE = {Family.GPT2: "gpt-2", Family.LLAMA3: "llama-bpe", Family.QWEN2: "qwen2"}
_TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
)  # names of the token that ends a turn, where that is not the end of text
_PADDING_SCORE = -10000.0


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The keys `tokenizer.*`.

    Args:
        tokenizer: of any kind.
        vocab_size: rows of the embedding; ids that the tokenizer does not know become padding.

    Raises:
        UnsupportedError: GGUF has no name for what the tokenizer does, or it has more ids than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UnsupportedError(
            f"the tokenizer ({tokenizer.kind}) has {tokenizer.vocab_size} tokens and the embedding "
            f"{vocab_size} rows; a GGUF file cannot hold that"
        )
    model = spm_model_of(tokenizer)
    if model is not None:
        keys = _sentencepiece(model, tokenizer, vocab_size)
    elif isinstance(tokenizer, PipelineTokenizer):
        keys = _byte_level(tokenizer, vocab_size)
    else:
        raise UnsupportedError(f"a tokenizer of the kind {tokenizer.kind} cannot be written into a GGUF file")
    keys |= _special(tokenizer)
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if tokenizer.chat_template is not None:
        named["tokenizer.chat_template"] = tokenizer.chat_template
    return named


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    """Which tokens begin and end a text; one that ends a turn, where that is another one."""
    keys: dict[str, Any] = {"add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    if tokenizer.bos_token_id is not None:
        keys["bos_token_id"] = tokenizer.bos_token_id
    if tokenizer.eos_token_ids:
        keys["eos_token_id"] = tokenizer.eos_token_ids[0]
        turns = [tokenizer.special_tokens[name] for name in _TURN_ENDS if name in tokenizer.special_tokens]
        if turns and turns[0] != tokenizer.eos_token_ids[0]:
            keys["eot_token_id"] = turns[0]
    return keys


def _sentencepiece(model: SpmModel, tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    for unwanted, what in (
        (model.model_type != BPE, "is a unigram model"),
        (model.normalization, "normalizes its text"),
        (model.whitespace_as_suffix, "puts blanks behind words"),
    ):
        if unwanted:
            raise UnsupportedError(f"the tokenizer ({tokenizer.kind}) {what}, which a GGUF file cannot say")
    pieces = list(model.pieces)
    padding = range(len(pieces), vocab_size)
    keys: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in pieces] + [_padding(i) for i in padding],
        "scores": [float(piece.score) for piece in pieces] + [_PADDING_SCORE for _ in padding],
        "token_type": [int(piece.kind) for piece in pieces] + [int(PieceType.UNUSED) for _ in padding],
        "add_space_prefix": model.add_dummy_prefix,
    }
    if model.remove_extra_whitespaces:
        keys["remove_extra_whitespaces"] = True
    unknown = [i for i, piece in enumerate(pieces) if piece.kind is PieceType.UNKNOWN]
    if unknown:
        keys["unknown_token_id"] = unknown[0]
    return keys


def _byte_level(tokenizer: PipelineTokenizer, vocab_size: int) -> dict[str, Any]:
    definition = tokenizer.definition()
    model = definition["model"]
    tokens = [_padding(i) for i in range(vocab_size)]
    types = [PieceType.UNUSED] * vocab_size
    for text, token_id in model["vocab"].items():
        tokens[token_id], types[token_id] = text, PieceType.NORMAL
    for token in definition["added_tokens"]:
        kind = PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    return {
        "model": "gpt2",
        "pre": _PRE[_family(definition, tokenizer.kind)],
        "tokens": tokens,
        "token_type": [int(kind) for kind in types],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }


def _padding(token_id: int) -> str:
    return f"[PAD{token_id}]"


def _family(definition: Mapping[str, Any], kind: str) -> Family:
    """How the pipeline cuts a text into words."""
    steps = definition.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return Family.GPT2
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern and pattern in {family.value for family in Family}:
            return Family(pattern)
    raise UnsupportedError(
        f"the tokenizer ({kind}) cuts a text into words in a way that has no name in GGUF here; "
        f"known: {', '.join(_PRE.values())}"
    )
