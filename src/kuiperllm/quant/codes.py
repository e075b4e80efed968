"""How the codes of a quantized matrix lie in memory or in a file: planes of bits in blocks of columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuiperllm.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of each code of a block.

    A byte holds 8 / `bits` columns that lie `run` apart: column c of the block is in byte
    `offset` + c // span * run + c % run, where span = run * 8 / bits, at bit (c % span) // run * bits.
    """

    offset: int
    """Byte of the block at which the plane begins."""
    bits: int
    """1, 2, 4 or 8."""
    run: int = 1

    def bytes_of(self, columns: int) -> int:
        """Bytes that so many columns take."""
        return columns * self.bits // 8


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """Where codes lie in a row that is cut into blocks of columns."""

    block_size: int
    """Columns of a block."""
    block_bytes: int
    """From a block to the next one, whatever else lies between its codes included."""
    planes: tuple[Plane, ...]
    """Of the low bits first."""
    flip: int = 0
    """XORed to each code: 0x80 makes codes of two's complement."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return sum(plane.bits for plane in self.planes)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.block_size * self.block_bytes


BYTES = CodeLayout(1, 1, (Plane(0, 8),))
"""A byte for each code."""
INT8 = CodeLayout(1, 1, (Plane(0, 8),), flip=0x80)
"""int8 values, whose code is the value + 128."""
NIBBLES = CodeLayout(2, 1, (Plane(0, 4),))
"""Two codes in a byte, the first in its low half."""


def dense_layout(bits: int) -> CodeLayout:
    """A layout without gaps: bytes, nibbles, or for odd numbers of bits planes of 32 columns."""
    if bits in (4, 8):
        return NIBBLES if bits == 4 else BYTES
    planes, offset, rest = [], 0, bits
    for width in (4, 2, 1):
        if rest >= width:
            planes.append(Plane(offset, width))
            offset += planes[-1].bytes_of(32)
            rest -= width
    return CodeLayout(32, offset, tuple(planes))


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """The codes of a matrix [N, K].

    Raises:
        ShapeError: the bytes do not hold such a matrix.
    """

    data: NDArray[np.uint8]
    """uint8 [N, row bytes]; rows may be any distance apart."""
    layout: CodeLayout
    columns: int
    """K."""

    def __post_init__(self) -> None:
        row_bytes = self.layout.row_bytes(self.columns)
        if (
            self.data.ndim != 2
            or self.data.dtype != np.uint8
            or self.data.shape[1] != row_bytes
            or self.columns % self.layout.block_size
            or 0 in self.data.shape
        ):
            raise ShapeError(
                f"codes of {self.columns} columns take {row_bytes} bytes a row, not "
                f"{self.data.dtype} {list(self.data.shape)}"
            )

    @classmethod
    def of_bytes(cls, codes: NDArray[np.uint8]) -> Codes:
        """Codes [N, K] of a byte each."""
        return cls(codes, BYTES, codes.shape[1])

    @classmethod
    def packed(cls, codes: NDArray[np.uint8], layout: CodeLayout) -> Codes:
        """A copy of codes [N, K] of a byte each, in another layout; bytes between them are 0."""
        data = np.zeros((len(codes), layout.row_bytes(codes.shape[1])), np.uint8)
        write_codes(codes, layout, data)
        return cls(data, layout, codes.shape[1])

    @classmethod
    def of_int8(cls, values: NDArray[np.int8]) -> Codes:
        """int8 values [N, K], which have the codes value + 128."""
        return cls(values.view(np.uint8), INT8, values.shape[1])

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> Codes:
        """Some rows: a view for a slice, a copy for a list of indices."""
        return Codes(self.data[rows], self.layout, self.columns)

    def unpack(self) -> NDArray[np.uint8]:
        """The codes, uint8 [N, K]; a view where the layout allows."""
        rows, layout = self.data.shape[0], self.layout
        blocks = self.data.reshape(rows, self.columns // layout.block_size, layout.block_bytes)
        codes: NDArray[np.uint8] | None = None
        shift = 0
        for plane in layout.planes:
            part = _unpack_plane(blocks, plane, layout.block_size).reshape(rows, self.columns)
            codes = part if codes is None else codes | part << np.uint8(shift)
            shift += plane.bits
        assert codes is not None
        return codes ^ np.uint8(layout.flip) if layout.flip else codes


def write_codes(codes: NDArray[np.uint8], layout: CodeLayout, data: NDArray[np.uint8]) -> None:
    """Lay out codes [N, K] of a byte each in `data` [N, row bytes], whose other bytes stay as they are."""
    blocks = data.reshape(len(data), -1, layout.block_bytes)
    if layout.flip:
        codes = codes ^ np.uint8(layout.flip)
    codes = codes.reshape(*blocks.shape[:2], layout.block_size)
    for plane in layout.planes:
        stored = blocks[:, :, plane.offset : plane.offset + plane.bytes_of(layout.block_size)]
        stored[:] = _pack_plane(codes, plane)
        codes = codes >> np.uint8(plane.bits % 8)


def _pack_plane(codes: NDArray[np.uint8], plane: Plane) -> NDArray[np.uint8]:
    """The low bits of codes [N, blocks, block_size] as a plane's bytes, [N, blocks, bytes]."""
    if plane.bits == 8:
        return codes
    runs = codes.reshape(*codes.shape[:2], -1, 8 // plane.bits, plane.run)
    mask = np.uint8((1 << plane.bits) - 1)
    stored = runs[:, :, :, 0] & mask
    for i in range(1, 8 // plane.bits):
        stored |= (runs[:, :, :, i] & mask) << np.uint8(i * plane.bits)
    return stored.reshape(*codes.shape[:2], -1)


def _unpack_plane(blocks: NDArray[np.uint8], plane: Plane, block_size: int) -> NDArray[np.uint8]:
    """[N, blocks, bytes] -> the plane's bits of each column, [N, blocks, block_size]."""
    stored = blocks[:, :, plane.offset : plane.offset + plane.bytes_of(block_size)]
    if plane.bits == 8:
        return stored
    per_byte = 8 // plane.bits
    runs = stored.reshape(*stored.shape[:2], -1, plane.run)
    spread = np.empty((*runs.shape[:3], per_byte, plane.run), np.uint8)
    for i in range(per_byte):  # a loop, because NumPy is slow where a last dimension is 1
        np.right_shift(runs, np.uint8(i * plane.bits), out=spread[:, :, :, i])
    spread &= np.uint8((1 << plane.bits) - 1)
    return spread.reshape(*stored.shape[:2], block_size)
