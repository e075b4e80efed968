"""The file format of SentencePiece models, as far as a tokenizer needs it.

A model is a protocol-buffer message `ModelProto` (sentencepiece_model.proto): pieces with scores and types, a
`TrainerSpec` and a `NormalizerSpec`. It is taken apart and checked here before the native library sees a copy
made of the checked parts: the library trusts its input more than a downloaded file deserves. The same copy
can be made from a vocabulary that came in another format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from kuiperllm.errors import TokenizerError

UNIGRAM, BPE = 1, 2


class PieceType(IntEnum):
    """What a piece is; GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary; blanks are written as U+2581."""

    text: str
    score: float = 0.0
    kind: PieceType = PieceType.NORMAL


@dataclass(frozen=True, slots=True)
class SpmModel:
    """The parts of a `ModelProto` that decide how a text is encoded."""

    pieces: Sequence[Piece]
    model_type: int = BPE
    byte_fallback: bool = True
    whitespace_as_suffix: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    escape_whitespaces: bool = True
    normalization: bytes = b""
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"


# --- reading ----------------------------------------------------------------------------------------------

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

Field = tuple[int, int, int, int]
"""Number, wire type, and either value and 0 or start and end of the contents."""


def parse(data: bytes, where: str) -> SpmModel:
    """Read a serialized `ModelProto`.

    Raises:
        TokenizerError: the file is truncated or corrupt, or of a type other than unigram and BPE.
    """
    pieces: list[Piece] = []
    values: dict[str, int] = {}
    texts: dict[str, bytes] = {}
    for number, wire, start, end in _fields(data, 0, len(data), where):
        if wire != _LENGTH:
            continue
        if number == 1:
            pieces.append(_piece(data, start, end, f"{where}: piece {len(pieces)}"))
        elif number in _SPECS:
            names = _SPECS[number]
            for field, wire_type, first, last in _fields(data, start, end, where):
                if field in names and wire_type == _VARINT:
                    values[names[field]] = first
                elif field in names and wire_type == _LENGTH:
                    texts[names[field]] = data[first:last]
    model_type = values.get("model_type", UNIGRAM)
    if model_type not in (UNIGRAM, BPE):
        raise TokenizerError(f"{where}: SentencePiece model type {model_type} is not supported (1 or 2 is)")
    normalization = texts.get("normalization", b"")
    _check_normalization(normalization, where)
    return SpmModel(
        pieces=pieces,
        model_type=model_type,
        byte_fallback=bool(values.get("byte_fallback", 0)),
        whitespace_as_suffix=bool(values.get("whitespace_as_suffix", 0)),
        add_dummy_prefix=bool(values.get("add_dummy_prefix", 1)),
        remove_extra_whitespaces=bool(values.get("remove_extra_whitespaces", 1)),
        escape_whitespaces=bool(values.get("escape_whitespaces", 1)),
        normalization=normalization,
        bos_piece=texts.get("bos_piece", b"<s>").decode("utf-8", "replace"),
        eos_piece=texts.get("eos_piece", b"</s>").decode("utf-8", "replace"),
    )


# Field numbers of TrainerSpec (field 2 of the model) and NormalizerSpec (field 3).
_SPECS = {
    2: {
        3: "model_type",
        24: "whitespace_as_suffix",
        35: "byte_fallback",
        46: "bos_piece",
        47: "eos_piece",
    },
    3: {
        2: "normalization",
        3: "add_dummy_prefix",
        4: "remove_extra_whitespaces",
        5: "escape_whitespaces",
    },
}


def _piece(data: bytes, start: int, end: int, where: str) -> Piece:
    text, score, kind = b"", 0.0, PieceType.NORMAL
    for number, wire, first, last in _fields(data, start, end, where):
        if number == 1 and wire == _LENGTH:
            text = data[first:last]
        elif number == 2 and wire == _FIXED32:
            (score,) = struct.unpack_from("<f", data, first)
        elif number == 3 and wire == _VARINT:
            if not 1 <= first <= 6:
                raise TokenizerError(f"{where} has the unknown type {first}")
            kind = PieceType(first)
    try:
        return Piece(text.decode("utf-8"), score, kind)
    except UnicodeDecodeError:
        raise TokenizerError(f"{where} is not UTF-8") from None


def _fields(data: bytes, position: int, end: int, where: str) -> Iterator[Field]:
    """The fields of the message in `data[position:end]`; every length is checked against `end`."""
    while position < end:
        tag, position = _varint(data, position, end, where)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(data, position, end, where)
            yield number, wire, value, 0
            continue
        if wire == _LENGTH:
            size, position = _varint(data, position, end, where)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise TokenizerError(f"{where}: not a SentencePiece model (wire type {wire} at byte {position})")
        if size > end - position:
            raise TokenizerError(
                f"{where}: truncated: {size} bytes promised at byte {position}, {end - position} left"
            )
        yield number, wire, position, position + size
        position += size


def _varint(data: bytes, position: int, end: int, where: str) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise TokenizerError(f"{where}: truncated or corrupt number at byte {position}")


def _check_normalization(blob: bytes, where: str) -> None:
    """Check that no step in the compiled normalization rules leaves the table.

    The blob is the size of a double-array trie, the trie, and the replacement texts, each ending with a
    zero byte. A unit of the trie leads to unit `index ^ offset ^ byte`, or holds the position of a text.
    """
    if not blob:
        return
    problem = TokenizerError(f"{where}: the normalization rules are corrupt")
    if len(blob) < 8:
        raise problem
    size = int.from_bytes(blob[:4], "little")
    texts = blob[4 + size :]
    if size % 4 or not 1024 <= size <= len(blob) - 4 or not texts.endswith(b"\0"):
        raise problem
    units = np.frombuffer(blob, np.uint32, size // 4, offset=4)
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    reached = np.arange(len(units), dtype=np.uint32) ^ offsets
    leads = units >> 31 == 0  # the others hold a value, and are never followed except at the root
    leads[0] = True
    if np.any((reached[leads] | 0xFF) >= len(units)):
        raise problem
    leaves = units[reached[leads & (units & 0x100 != 0)]] & 0x7FFFFFFF
    if np.any(leaves >= len(texts)):
        raise problem


# --- writing ----------------------------------------------------------------------------------------------


def serialize(model: SpmModel) -> bytes:
    """A `ModelProto` that the native library reads."""
    out = bytearray()
    for piece in model.pieces:
        body = _bytes_field(1, piece.text.encode("utf-8"))
        body += b"\x15" + struct.pack("<f", piece.score)
        if piece.kind is not PieceType.NORMAL:
            body += b"\x18" + bytes([piece.kind])
        out += _bytes_field(1, body)
    trainer = (
        _number_field(3, model.model_type)
        + _number_field(24, model.whitespace_as_suffix)
        + _number_field(35, model.byte_fallback)
    )
    normalizer = (
        _bytes_field(2, model.normalization)
        + _number_field(3, model.add_dummy_prefix)
        + _number_field(4, model.remove_extra_whitespaces)
        + _number_field(5, model.escape_whitespaces)
    )
    return bytes(out) + _bytes_field(2, trainer) + _bytes_field(3, normalizer)


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number_field(number: int, value: int) -> bytes:
    return _number(number << 3 | _VARINT) + _number(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _number(number << 3 | _LENGTH) + _number(len(value)) + value
