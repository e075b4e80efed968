"""The GGUF container, versions 2 and 3, little endian: key/value pairs, tensor descriptions, tensor bytes.

Source: docs/gguf.md of ggml-org/ggml. Every count and length is checked against what is left of the file
before anything is allocated for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.mapping import MappedFile
from kuiperllm.errors import CheckpointError, UnsupportedError
from kuiperllm.quant.ggml import BlockFormat, find_format

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Bounds far above any real model, which keep a hostile file from costing much more memory than its own size.
MAX_HEADER_BYTES = 256 << 20
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ARRAY_ITEMS = 1 << 22  # of all arrays together: tokens, scores, types and merges of a vocabulary
MAX_STRING_BYTES = 16 << 20
MAX_NAME_BYTES = 4096
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")
_SMALLEST_PAIR = 8 + 4 + 1  # an empty key, a type, a byte
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # an empty name, no dimension, a type, an offset


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor description, checked against the file."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as in NumPy; the file has it the other way round."""
    format: BlockFormat
    offset: int
    """From the beginning of the file."""
    nbytes: int


class GgufFile:
    """An opened GGUF file whose header has been checked in full.

    Raises:
        CheckpointError: the file is unreadable, truncated or corrupt.
        UnsupportedError: the version, byte order, an array or a tensor type is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.file = MappedFile(path)
        cursor = _Cursor(self.file)
        tensors, pairs = self._counts(cursor)
        self.metadata = self._read_metadata(cursor, pairs)
        """The key/value pairs; arrays are lists."""
        self.tensors = self._read_tensors(cursor, tensors)
        """Tensors by their name in the file."""

    def _counts(self, cursor: _Cursor) -> tuple[int, int]:
        if cursor.take(len(MAGIC)) != MAGIC:
            raise cursor.corrupt("it does not start with GGUF")
        version = cursor.number("I")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise UnsupportedError(
                    f"{self.file.path}: big-endian GGUF is not supported; little-endian is"
                )
            raise UnsupportedError(
                f"{self.file.path}: GGUF version {version} is not supported; supported: 2 and 3"
            )
        tensors = cursor.count("tensors", MAX_TENSORS, _SMALLEST_TENSOR)
        pairs = cursor.count("key/value pairs", MAX_PAIRS, _SMALLEST_PAIR)
        return tensors, pairs

    def _read_metadata(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.string(MAX_NAME_BYTES)
            if key in metadata:
                raise cursor.corrupt(f"the key {brief(key)} appears twice")
            metadata[key] = cursor.value(key)
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GgufTensor]:
        described = [self._describe(cursor) for _ in range(count)]
        alignment = self._alignment(cursor)
        data_start = -(-cursor.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end, owner = data_start, ""
        for name, shape, block_format, relative in sorted(described, key=lambda item: item[3]):
            nbytes = math.prod(shape) // block_format.block_size * block_format.block_bytes
            offset = data_start + relative
            if name in tensors:
                raise cursor.corrupt(f"tensor {brief(name)} appears twice")
            if relative % alignment:
                raise cursor.corrupt(f"tensor {brief(name)} starts at {relative}, no multiple of {alignment}")
            if offset + nbytes > self.file.size:
                raise cursor.corrupt(
                    f"tensor {brief(name)} ends at byte {offset + nbytes} of {self.file.size}; "
                    "the file is truncated"
                )
            if offset < end:
                raise cursor.corrupt(f"tensors {brief(owner)} and {brief(name)} overlap")
            tensors[name] = GgufTensor(name, shape, block_format, offset, nbytes)
            end, owner = offset + nbytes, name
        return tensors

    def _describe(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], BlockFormat, int]:
        """Name, shape, type and offset (from the start of the data) of the next tensor."""
        name = cursor.string(MAX_NAME_BYTES)
        dimensions = cursor.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise cursor.corrupt(f"tensor {brief(name)} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        block_format = find_format(cursor.number("I"), f"{self.file.path}: tensor {brief(name)}")
        if 0 in shape or math.prod(shape) > self.file.size * block_format.block_size:
            raise cursor.corrupt(
                f"tensor {brief(name)} has the shape {list(shape)}, more than the file holds"
            )
        if shape[-1] % block_format.block_size:
            raise cursor.corrupt(
                f"tensor {brief(name)} has rows of {shape[-1]}, which {block_format.name} "
                f"cannot divide into blocks of {block_format.block_size}"
            )
        return name, shape, block_format, cursor.number("Q")

    def _alignment(self, cursor: _Cursor) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise cursor.corrupt(
                f"general.alignment is {brief(alignment)}; it must be a power of two up to {MAX_ALIGNMENT}"
            )
        return alignment


class _Cursor:
    """Reads the header from front to back and never past its end."""

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self.memory = file.memory
        self.whole = file.size <= MAX_HEADER_BYTES
        self.end = min(file.size, MAX_HEADER_BYTES)
        self.position = 0
        self.array_items_left = MAX_ARRAY_ITEMS

    def corrupt(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason}")

    def too_long(self, what: str) -> CheckpointError:
        end = "the end of the file; it is truncated or corrupt" if self.whole else f"byte {self.end}"
        return self.corrupt(f"{what} at byte {self.position} of its header reaches beyond {end}")

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.end - self.position:
            raise self.too_long(f"a field of {nbytes} bytes")
        taken = self.memory[self.position : self.position + nbytes]
        self.position += nbytes
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str, most: int, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each."""
        count: int = self.number("Q")
        if count > most or count * smallest > self.end - self.position:
            raise self.corrupt(f"its header claims {count} {what}, more than it can hold")
        return count

    def string(self, most: int = MAX_STRING_BYTES) -> str:
        length: int = self.number("Q")
        if length > most:
            raise self.too_long(f"a string of {length} bytes")
        text = self.take(length)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt(
                f"a string ending at byte {self.position} of its header is not UTF-8"
            ) from None

    def value(self, key: str) -> Any:
        kind = self.number("I")
        return self.array(key) if kind == _ARRAY else self._reader(kind, key)()

    def _reader(self, kind: int, key: str) -> Callable[[], Any]:
        if kind == _STRING:
            return self.string
        if (code := _NUMBERS.get(kind)) is not None:
            return lambda: self.number(code)
        raise self.corrupt(f"the key {brief(key)} has the value type {kind}, which does not exist")

    def array(self, key: str) -> list[Any]:
        kind = self.number("I")
        if kind == _ARRAY:
            raise UnsupportedError(
                f"{self.path}: the key {brief(key)} holds nested arrays, which is not supported"
            )
        self._reader(kind, key)
        code = _NUMBERS.get(kind)
        size = struct.calcsize("<" + code) if code else _LENGTH.size
        count = self.count(f"items of {brief(key)}", self.array_items_left, size)
        self.array_items_left -= count
        if code is not None:
            return list(struct.unpack(f"<{count}{code}", self.take(count * size)))
        return self.strings(count)

    def strings(self, count: int) -> list[str]:
        """`count` strings. As `string`, in one loop: a vocabulary has some hundred thousand."""
        memory, position, end = self.memory, self.position, self.end
        found = []
        try:
            for _ in range(count):
                (length,) = _LENGTH.unpack_from(memory, position)
                start = position + 8
                position = start + length
                if position > end or length > MAX_STRING_BYTES:
                    self.position = start
                    raise self.too_long(f"a string of {length} bytes")
                found.append(memory[start:position].decode("utf-8"))
        except struct.error:
            self.position = position
            raise self.too_long("a string") from None
        except UnicodeDecodeError:
            raise self.corrupt(f"a string ending at byte {position} of its header is not UTF-8") from None
        self.position = position
        return found
