"""The front of a GGUF file, version 3: key/value pairs and tensor descriptions.

Source: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kuiperllm.checkpoint.gguf_file import DEFAULT_ALIGNMENT, MAGIC

VERSION = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11


class Description(NamedTuple):
    """A tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first."""
    type_number: int
    nbytes: int


def header(pairs: Mapping[str, Any], tensors: Sequence[Description]) -> bytes:
    """All that comes before the tensors, which follow at multiples of 32, each in the order of `tensors`.

    Types follow from the values: numbers become uint32 (int32 or 64 bits where they have to), float32, bool;
    lists become arrays of int32, float32 or strings.
    """
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(pairs)))
    for key, value in pairs.items():
        out += _string(key) + _typed(value)
    offset = 0
    for tensor in tensors:
        out += _string(tensor.name)
        out += struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        out += struct.pack("<IQ", tensor.type_number, offset)
        offset += -(-tensor.nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    return bytes(out) + bytes(-len(out) % DEFAULT_ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """The number of a type, and a value of it."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return struct.pack("<I", _ARRAY) + _array(value)


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 32:
        return struct.pack("<II", _UINT32, value)
    if -(1 << 31) <= value < 0:
        return struct.pack("<Ii", _INT32, value)
    if value > 0:
        return struct.pack("<IQ", _UINT64, value)
    return struct.pack("<Iq", _INT64, value)


def _array(values: Sequence[Any]) -> bytes:
    """The type of its items, their number, the items."""
    if all(isinstance(value, bool) for value in values) and values:
        return struct.pack(f"<IQ{len(values)}?", _BOOL, len(values), *values)
    if all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values))
    if all(isinstance(value, int) for value in values):
        fits = all(-(1 << 31) <= value < 1 << 31 for value in values)
        kind, code = (_INT32, "i") if fits else (_INT64, "q")
        return struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values)
    return struct.pack(f"<IQ{len(values)}f", _FLOAT32, len(values), *values)
