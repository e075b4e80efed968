"""The tokenizer inside a GGUF file, from the file's key/value section.

Key names and token types: the GGUF specification in the ggml repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kuiperllm.errors import TokenizerError, UnsupportedError
from kuiperllm.text.bpe_files import parse_merges
from kuiperllm.text.byte_level import Family, build_pipeline
from kuiperllm.text.files import AddedToken
from kuiperllm.text.pipeline import BYTE_LEVEL, PipelineTokenizer, add_tokens
from kuiperllm.text.spm import SentencePieceTokenizer, infer_types
from kuiperllm.text.spm_model import Piece, PieceType, SpmModel
from kuiperllm.text.tokenizer import END_TOKENS, Tokenizer

_WHERE = "the GGUF tokenizer"

_FAMILIES = {
    "gpt-2": Family.GPT2,
    "llama-bpe": Family.LLAMA3,
    "llama3": Family.LLAMA3,
    "llama-v3": Family.LLAMA3,
    "qwen2": Family.QWEN2,
    "deepseek-r1-qwen": Family.QWEN2,
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata describes.

    Args:
        metadata: the parsed key/value section; arrays as lists or NumPy arrays.

    Raises:
        TokenizerError: a key is missing or contradicts another.
        UnsupportedError: the vocabulary or its pre-tokenizer is of an unknown kind.
    """
    vocab = _Vocabulary(metadata)
    if vocab.model == "llama":
        return _sentencepiece(vocab)
    if vocab.model == "gpt2":
        return _byte_level(vocab)
    raise UnsupportedError(
        f"tokenizer.ggml.model={vocab.model!r} is not supported; supported: llama (SentencePiece), gpt2 (BPE)"
    )


class _Vocabulary:
    """Typed access to the keys `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.model = self.text("model")
        self.tokens = self.texts("tokens")
        if not self.tokens:
            raise TokenizerError(f"{_WHERE}: tokenizer.ggml.tokens is missing or empty")
        self.types = self._types()
        self.bos = self.token_id("bos_token_id")
        ends = [self.token_id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        named = [i for i, token in enumerate(self.tokens) if token in END_TOKENS and self.is_control(i)]
        self.ends = [token_id for token_id in (*ends, *named) if token_id is not None]
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    def is_control(self, token_id: int) -> bool:
        return self.types is not None and self.types[token_id] is PieceType.CONTROL

    def get(self, name: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}")

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"{_WHERE}: tokenizer.ggml.{name} must be a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool | np.bool_):
            raise TokenizerError(f"{_WHERE}: tokenizer.ggml.{name} must be true or false")
        return default if value is None else bool(value)

    def token_id(self, name: str) -> int | None:
        """A token id; writers use impossible ones such as 2**32 - 1 for "none"."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            return None
        return int(value) if 0 <= value < len(self.tokens) else None

    def texts(self, name: str) -> list[str]:
        value = self.get(name)
        items = [] if value is None else self._items(name, value)
        if not all(isinstance(item, str) for item in items):
            raise TokenizerError(f"{_WHERE}: tokenizer.ggml.{name} must be a list of strings")
        try:
            "".join(items).encode("utf-8")
        except UnicodeEncodeError:
            raise TokenizerError(f"{_WHERE}: tokenizer.ggml.{name} holds text that is not UTF-8") from None
        return items

    def numbers(self, name: str) -> list[Any] | None:
        """One number for each token, or None if the key is missing."""
        value = self.get(name)
        if value is None:
            return None
        items = self._items(name, value)
        if not all(isinstance(item, int | float) for item in items):
            raise TokenizerError(f"{_WHERE}: tokenizer.ggml.{name} must be a list of numbers")
        if len(items) != len(self.tokens):
            raise TokenizerError(
                f"{_WHERE}: tokenizer.ggml.{name} has {len(items)} entries for {len(self.tokens)} tokens"
            )
        return items

    def _items(self, name: str, value: Any) -> list[Any]:
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise TokenizerError(f"{_WHERE}: tokenizer.ggml.{name} must be a list")
        return list(value)

    def _types(self) -> list[PieceType] | None:
        numbers = self.numbers("token_type")
        if numbers is None:
            return None
        known = {int(kind): kind for kind in PieceType}
        # 0 is "undefined" in the specification and occurs for ordinary tokens.
        return [known.get(number, PieceType.NORMAL) for number in numbers]


def _sentencepiece(vocab: _Vocabulary) -> Tokenizer:
    scores = vocab.numbers("scores")
    if scores is None:
        raise TokenizerError(f"{_WHERE}: tokenizer.ggml.scores is missing")
    if vocab.types is None:
        pieces = infer_types(zip(vocab.tokens, scores, strict=True))
    else:
        pieces = [Piece(*entry) for entry in zip(vocab.tokens, scores, vocab.types, strict=True)]
    for token_id in (vocab.bos, *vocab.ends):
        if token_id is not None:
            pieces[token_id] = pieces[token_id]._replace(kind=PieceType.CONTROL)
    if not any(piece.kind is PieceType.UNKNOWN for piece in pieces):
        unknown = vocab.token_id("unknown_token_id") or 0
        pieces[unknown] = pieces[unknown]._replace(kind=PieceType.UNKNOWN)
    model = SpmModel(
        pieces,
        add_dummy_prefix=vocab.flag("add_space_prefix", True),
        remove_extra_whitespaces=vocab.flag("remove_extra_whitespaces", False),
    )
    return SentencePieceTokenizer(
        model,
        where=_WHERE,
        kind="gguf spm",
        bos_token_id=vocab.bos,
        eos_token_ids=vocab.ends,
        add_bos=vocab.flag("add_bos_token", True),
        chat_template=vocab.chat_template,
    )


def _byte_level(vocab: _Vocabulary) -> Tokenizer:
    ids = {token: token_id for token_id, token in enumerate(vocab.tokens)}
    if len(ids) != len(vocab.tokens):
        raise TokenizerError(f"{_WHERE}: two tokens are the same")
    merges = parse_merges(vocab.texts("merges"), f"{_WHERE}: tokenizer.ggml.merges")
    added = _added_tokens(vocab)
    family = _family(vocab, ids, added)
    native = build_pipeline(ids, merges, family, where=_WHERE)
    add_tokens(native, added, _WHERE)
    return PipelineTokenizer(
        native,
        BYTE_LEVEL,
        kind="gguf bpe",
        vocab_size=len(ids),
        special_tokens={token.content: token.token_id for token in added if token.special},
        bos_token_id=vocab.bos,
        eos_token_ids=vocab.ends,
        add_bos=vocab.flag("add_bos_token", family is Family.LLAMA3),
        chat_template=vocab.chat_template,
    )


def _family(vocab: _Vocabulary, ids: Mapping[str, int], added: list[AddedToken]) -> Family:
    name = vocab.text("pre")
    if name is None or name == "default":  # written before the key was introduced
        return Family.guess(ids, (token.content for token in added))
    if name not in _FAMILIES:
        raise UnsupportedError(
            f"tokenizer.ggml.pre={name!r} is not supported; supported: {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[name]


def _added_tokens(vocab: _Vocabulary) -> list[AddedToken]:
    types = vocab.types or [PieceType.NORMAL] * len(vocab.tokens)
    special = {i for i, kind in enumerate(types) if kind in (PieceType.CONTROL, PieceType.UNKNOWN)}
    special |= {token_id for token_id in (vocab.bos, *vocab.ends) if token_id is not None}
    defined = {i for i, kind in enumerate(types) if kind is PieceType.USER_DEFINED}
    return [
        AddedToken(i, vocab.tokens[i], special=i in special)
        for i in sorted(special | defined)
        if vocab.tokens[i]
    ]
