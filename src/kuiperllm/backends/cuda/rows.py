"""How launchers of kernels that walk along rows choose vector loads and grids."""

from __future__ import annotations

from kuiperllm.core import DType, Tensor

VECTOR_BYTES = 16
"""What a thread loads or stores at once."""

_MAX_GRID_Y = 65_535


def vector_width(width: int, dtype: DType, *tensors: Tensor) -> int:
    """Elements of `dtype` that fill a vector if rows of `width` of them consist of aligned vectors, else 1.

    Args:
        width: elements of a row, or of each part of it that is addressed by itself.
        dtype: the type whose vectors are counted.
        tensors: their rows, along the last axis, must begin at multiples of 16 bytes, in whatever type.
    """
    step = VECTOR_BYTES // dtype.itemsize
    if width % step:
        return 1
    for tensor in tensors:
        if tensor.address % VECTOR_BYTES:
            return 1
        itemsize = tensor.itemsize
        for size, stride in zip(tensor.shape[:-1], tensor.strides, strict=False):
            if size > 1 and stride * itemsize % VECTOR_BYTES:
                return 1
    return step


def grid(columns: int, rows: int, block: int) -> tuple[int, int]:
    """Blocks of `block` threads: along x a thread for each column, along y rows, which kernels loop over."""
    return -(-columns // block), min(rows, _MAX_GRID_Y)
