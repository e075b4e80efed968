"""A copy between strided views in few pieces."""

from __future__ import annotations

import ctypes
import itertools

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError

Axis = tuple[int, int, int]
"""Size, stride in the destination, stride in the source."""


def merged(dst: Tensor, src: Tensor) -> list[Axis]:
    """The axes of two views of one shape, with neighbours joined that act as one in both."""
    axes: list[Axis] = []
    for size, to, by in zip(dst.shape, dst.strides, src.strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (size * to, size * by):
            axes[-1] = (axes[-1][0] * size, to, by)
        else:
            axes.append((size, to, by))
    return axes


def copy_pieces(dst: Tensor, src: Tensor) -> int:
    """Copy the values of `src` to `dst`, both on the host and not overlapping; the number of pieces it took.

    Raises:
        ShapeError: the shapes or the types differ.
    """
    if dst.shape != src.shape or dst.dtype is not src.dtype:
        raise ShapeError(f"shape {list(dst.shape)}: cannot take {src.dtype} of shape {list(src.shape)}")
    if dst.numel == 0:
        return 0
    dst.buffer.require_writable()
    axes = merged(dst, src)
    together = 1
    if axes and axes[-1][1:] == (1, 1):
        together = axes.pop()[0]
    itemsize, to, by = dst.itemsize, dst.address, src.address
    pieces = 0
    for place in itertools.product(*(range(size) for size, _, _ in axes)):
        dst_offset = sum(i * axis[1] for i, axis in zip(place, axes, strict=True))
        src_offset = sum(i * axis[2] for i, axis in zip(place, axes, strict=True))
        ctypes.memmove(to + dst_offset * itemsize, by + src_offset * itemsize, together * itemsize)
        pieces += 1
    return pieces
