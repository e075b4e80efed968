"""What a GGUF tensor type is: a block of elements of fixed size, and how it unpacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.dtype import DType
from kuiperllm.errors import DTypeError, ShapeError, UnsupportedError
from kuiperllm.quant.codes import CodeLayout, Codes, write_codes
from kuiperllm.quant.scheme import Scheme
from kuiperllm.quant.tensor import QuantTensor

_PIECE_BYTES = 1 << 18  # of blocks at a time: they stay in the second-level cache

Blocks = NDArray[np.uint8]
"""uint8 [n, block_bytes]: blocks as they lie in a file, at even addresses."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A tensor type of GGUF files."""

    number: int
    """The value in the file."""
    name: str
    """ggml's name, such as Q8_0."""
    kind: DType | Scheme
    """What `unpack` gives, and `pack` takes."""
    block_size: int
    """Elements of a block, neighbours along the fastest dimension."""
    block_bytes: int
    unpack: Callable[[NDArray[np.uint8], tuple[int, ...]], NDArray[Any] | QuantTensor]
    """From the bytes of a whole tensor, one-dimensional and contiguous, and its shape (slowest dimension
    first, the last one a multiple of `block_size`), to the tensor; a view where the layout allows."""
    pack: Callable[[NDArray[Any] | QuantTensor], NDArray[np.uint8]]
    """The other way: a tensor of this kind to its bytes, [rows, row bytes] for a matrix."""


class GroupParts(NamedTuple):
    """What some blocks hold beside codes: [n, groups of a block], or [n, 1]; see `QuantTensor`."""

    scales: NDArray[Any]
    zeros: NDArray[Any] | None = None
    super_scales: NDArray[np.float16] | None = None
    super_zeros: NDArray[np.float16] | None = None

    def reshape(self, rows: int) -> GroupParts:
        """The same numbers in so many rows."""
        return GroupParts(*(None if part is None else part.reshape(rows, -1) for part in self))  # type: ignore[arg-type]


def quantized(
    number: int,
    name: str,
    scheme: Scheme,
    layout: CodeLayout,
    read: Callable[[Blocks], GroupParts],
    write: Callable[[GroupParts, Blocks], None],
) -> BlockFormat:
    """A type of quantized matrices.

    Args:
        number: the value in the file.
        name: ggml's name.
        scheme: what codes stand for.
        layout: where they lie in a block.
        read: copies all but the codes out of blocks.
        write: puts it there.
    """

    def unpack(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> QuantTensor:
        """The codes stay where they lie.

        Raises:
            UnsupportedError: the tensor is not a matrix.
        """
        if len(shape) != 2:
            raise UnsupportedError(f"{name} is supported for matrices, not for shape {shape}")
        rows, columns = shape
        parts = _read_in_pieces(raw.reshape(-1, layout.block_bytes), read).reshape(rows)
        return QuantTensor(scheme, Codes(raw.reshape(rows, -1), layout, columns), *parts)

    def pack(weight: NDArray[Any] | QuantTensor) -> NDArray[np.uint8]:
        """The bytes of a matrix of this scheme.

        Raises:
            DTypeError: it is of another scheme, or not quantized.
            ShapeError: its rows are not made of whole blocks, or its columns are stored in another order.
        """
        if not isinstance(weight, QuantTensor) or weight.scheme != scheme:
            found = weight.scheme if isinstance(weight, QuantTensor) else weight.dtype
            raise DTypeError(f"{name} holds {scheme}, not {found}")
        rows, columns = weight.shape
        if columns % layout.block_size:
            raise ShapeError(f"{name}: blocks of {layout.block_size} do not divide rows of {columns} weights")
        if weight.columns is not None:
            raise ShapeError(f"{name}: cannot hold columns in another order than the matrix has them")
        raw = np.empty((rows, layout.row_bytes(columns)), np.uint8)
        step = max(1, _PIECE_BYTES // raw.shape[1])
        for start in range(0, rows, step):
            _pack_rows(weight[start : start + step], layout, write, raw[start : start + step])
        return raw

    return BlockFormat(number, name, scheme, layout.block_size, layout.block_bytes, unpack, pack)


def _read_in_pieces(blocks: Blocks, read: Callable[[Blocks], GroupParts]) -> GroupParts:
    step = max(1, _PIECE_BYTES // blocks.shape[1])
    first = read(blocks[:step])
    if len(blocks) <= step:
        return first
    whole = [None if part is None else np.empty((len(blocks), part.shape[1]), part.dtype) for part in first]
    for start in range(0, len(blocks), step):
        for target, part in zip(whole, read(blocks[start : start + step]), strict=True):
            if target is not None:
                target[start : start + step] = part
    return GroupParts(*whole)  # type: ignore[arg-type]  # as many as `read` gives, None in the same places


def _pack_rows(
    weight: QuantTensor, layout: CodeLayout, write: Callable[[GroupParts, Blocks], None], raw: Blocks
) -> None:
    blocks = raw.reshape(-1, layout.block_bytes)
    write_codes(weight.codes.unpack(), layout, raw)
    parts = GroupParts(weight.scales, weight.zeros, weight.super_scales, weight.super_zeros)
    write(parts.reshape(len(blocks)), blocks)
