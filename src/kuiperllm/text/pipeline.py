"""Tokenizers that the `tokenizers` library runs, and the reading of tokenizer.json.

The file holds a whole pipeline: normalizer, pre-tokenizer, BPE model, decoder, added tokens. The library
encodes with it; how its tokens turn back into bytes is read off the decoder, which comes in two sorts:
byte-level (GPT-2, Llama 3, Qwen) and SentencePiece-like (Llama 2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from kuiperllm.errors import TokenizerError
from kuiperllm.text.byte_level import bytes_of_piece
from kuiperllm.text.files import AddedToken, TokenizerConfig, checked_vocab
from kuiperllm.text.tokenizer import END_TOKENS, Tokenizer, native_errors, one_line

if TYPE_CHECKING:
    import tokenizers

# Exactly two hex digits: "<0x-1>" and "<0x100>" are ordinary text.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


@dataclass(frozen=True, slots=True)
class PieceRules:
    """How a piece of the vocabulary turns into bytes.

    Attributes:
        byte_level: pieces are written in GPT-2's byte alphabet; the rest is for SentencePiece-like pieces.
        byte_fallback: `<0xHH>` stands for a byte.
        space: the character that stands for a blank.
        strips_leading_space: see `Tokenizer.strips_leading_space`.
    """

    byte_level: bool
    byte_fallback: bool = False
    space: str = "\u2581"
    strips_leading_space: bool = False

    def bytes_of(self, piece: str) -> bytes:
        """The bytes of one piece in mid-text."""
        if self.byte_level:
            return bytes_of_piece(piece)
        if self.byte_fallback and (match := BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(self.space, " ").encode("utf-8")


BYTE_LEVEL = PieceRules(byte_level=True)


class PipelineTokenizer(Tokenizer):
    """A tokenizer around a pipeline of the `tokenizers` library."""

    def __init__(self, native: tokenizers.Tokenizer, rules: PieceRules, **description: Any) -> None:
        super().__init__(strips_leading_space=rules.strips_leading_space, **description)
        self._native = native
        self.rules = rules
        self._added = {i: token.content for i, token in native.get_added_tokens_decoder().items()}
        self._lock = Lock()  # whether special tokens are parsed is a state of the native object

    def definition(self) -> dict[str, Any]:
        """The pipeline in the form of a tokenizer.json."""
        return dict(json.loads(self._native.to_str()))

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock, native_errors(f"{self.kind} cannot encode the text"):
            self._native.encode_special_tokens = not parse_special
            ids: list[int] = self._native.encode(text, add_special_tokens=False).ids
        return ids

    def _token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.encode("utf-8")
        piece = self._native.id_to_token(token_id)
        return b"" if piece is None else self.rules.bytes_of(piece)


def add_tokens(native: tokenizers.Tokenizer, added: Iterable[AddedToken], where: str) -> None:
    """Give a pipeline its added tokens, in the order of their ids.

    Raises:
        TokenizerError: an id contradicts the vocabulary, or leaves a hole behind it.
    """
    from tokenizers import AddedToken as NativeToken

    in_order = sorted(added, key=lambda token: token.token_id)
    with native_errors(where):
        for special, run in groupby(in_order, key=lambda token: token.special):
            tokens = [
                NativeToken(
                    t.content,
                    single_word=t.single_word,
                    lstrip=t.lstrip,
                    rstrip=t.rstrip,
                    normalized=t.normalized,
                    special=special,
                )
                for t in run
            ]
            if special:
                native.add_special_tokens(tokens)
            else:
                native.add_tokens(tokens)
    check_added_tokens(native, in_order, where)


def check_added_tokens(native: tokenizers.Tokenizer, added: Iterable[AddedToken], where: str) -> None:
    """Raise `TokenizerError` unless the pipeline uses the ids that the file gives.

    The library numbers added tokens itself, behind the vocabulary and without holes.
    """
    for token in added:
        if (found := native.token_to_id(token.content)) != token.token_id:
            raise TokenizerError(
                f"{where}: added token {token.content!r} has id {token.token_id}, but {found} follows from "
                "the vocabulary"
            )


# --- tokenizer.json ---------------------------------------------------------------------------------------


def load_tokenizer_json(path: Path, text: str, raw: dict[str, Any], config: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer that a tokenizer.json describes.

    Args:
        path: the file, for messages.
        text: its contents.
        raw: the same, parsed.
        config: what tokenizer_config.json adds.

    Raises:
        TokenizerError: the file is corrupt or asks for something that Llama and Qwen do not use.
    """
    from tokenizers import Tokenizer as NativeTokenizer

    where = str(path)
    vocab = _check_model(raw.get("model"), where)
    rules = piece_rules(raw.get("decoder"), where)
    added = _added_tokens(raw, where)
    if _neutralize(raw):
        text = json.dumps(raw)
    with native_errors(where):
        native = NativeTokenizer.from_str(text)
    check_added_tokens(native, added, where)
    later = [token for token in config.added_tokens if token.content not in {t.content for t in added}]
    add_tokens(native, later, where)

    special = {token.content: token.token_id for token in (*added, *later) if token.special}
    ids = [*vocab.values(), *(token.token_id for token in (*added, *later))]
    template_bos = _template_prefix(raw.get("post_processor"))
    bos_token = config.bos_token or template_bos
    return PipelineTokenizer(
        native,
        rules,
        kind="tokenizer.json",
        vocab_size=max(ids) + 1,
        special_tokens=special,
        bos_token_id=None if bos_token is None else native.token_to_id(bos_token),
        eos_token_ids=end_tokens(config, native.token_to_id, special),
        add_bos=template_bos is not None if config.add_bos is None else config.add_bos,
        chat_template=config.chat_template,
    )


def end_tokens(config: TokenizerConfig, id_of: Any, special: Mapping[str, int]) -> list[int]:
    """The configured end token, or where none is named the special tokens with a customary name."""
    if config.eos_token is not None and (token_id := id_of(config.eos_token)) is not None:
        return [token_id]
    return [special[name] for name in END_TOKENS if name in special]


def _check_model(model: object, where: str) -> dict[str, int]:
    """The vocabulary of the `model` section.

    Checked here is whatever makes the native library panic instead of answering.
    """
    if not isinstance(model, dict):
        raise TokenizerError(f"{where}: there is no model section")
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise TokenizerError(
            f"{where}: model type {one_line(repr(kind), 40)} is not supported; supported: BPE"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise TokenizerError(f"{where}: {name} is not supported with BPE")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"{where}: the model has no list of merges")
    return checked_vocab(model.get("vocab"), where)


def _added_tokens(raw: Mapping[str, Any], where: str) -> list[AddedToken]:
    entries = raw.get("added_tokens") or []
    if not isinstance(entries, list):
        raise TokenizerError(f"{where}: added_tokens must be a list")
    tokens = [
        AddedToken.from_json(e.get("id") if isinstance(e, Mapping) else None, e, where) for e in entries
    ]
    if len({token.token_id for token in tokens}) != len(tokens):
        raise TokenizerError(f"{where}: two added tokens share one id")
    return tokens


def _neutralize(raw: dict[str, Any]) -> bool:
    """Switch off what training left behind: truncation, padding and random merges. True if there was any."""
    changed = False
    for section, name in ((raw, "truncation"), (raw, "padding"), (raw["model"], "dropout")):
        if section.get(name) is not None:
            section[name] = None
            changed = True
    return changed


def _template_prefix(processor: object) -> str | None:
    """The special token that a post-processor's template puts in front of a text."""
    if not isinstance(processor, Mapping):
        return None
    if processor.get("type") == "Sequence" and isinstance(processor.get("processors"), list):
        prefixes = (_template_prefix(p) for p in processor["processors"] if p is not processor)
        return next((prefix for prefix in prefixes if prefix is not None), None)
    template = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(template, list) or not template:
        return None
    first = template[0].get("SpecialToken") if isinstance(template[0], Mapping) else None
    name = first.get("id") if isinstance(first, Mapping) else None
    return name if isinstance(name, str) else None


def piece_rules(decoder: object, where: str) -> PieceRules:
    """Read the `decoder` section of a tokenizer.json.

    Raises:
        TokenizerError: it is missing or neither byte-level nor SentencePiece-like.
    """
    steps: object = [decoder]
    if isinstance(decoder, Mapping) and decoder.get("type") == "Sequence":
        steps = decoder.get("decoders")
    if not isinstance(steps, list) or not steps:
        raise TokenizerError(f"{where}: the decoder section is missing or malformed")
    space, byte_fallback, strips = None, False, False
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                return BYTE_LEVEL
            case {"type": "Metaspace", "replacement": str(replacement), **options}:
                space = replacement
                strips = options.get("prepend_scheme", "always") != "never"
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": " "}:
                space = pattern
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                strips = start == 1
            case {"type": "Fuse"}:
                pass
            case _:
                raise TokenizerError(
                    f"{where}: decoder {one_line(json.dumps(step), 80)} is not supported; supported: "
                    "ByteLevel, Metaspace, or Replace, ByteFallback, Fuse and Strip as Llama 2 has them"
                )
    if not isinstance(space, str) or len(space) != 1:
        raise TokenizerError(f"{where}: the decoder does not say what stands for a blank")
    return PieceRules(False, byte_fallback, space, strips)
