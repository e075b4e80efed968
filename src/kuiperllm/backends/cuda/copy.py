"""Copies between strided views of one GPU's memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.backends.cuda.launch import launch_on
from kuiperllm.core import layout

if TYPE_CHECKING:
    from kuiperllm.backends.cuda.backend import CudaBackend
    from kuiperllm.backends.cuda.driver import Chip

_SOURCE = Path(__file__).with_name("copy.cu")
_ELEMENTS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}
_THREADS = 256
_MAX_BLOCKS_PER_MULTIPROCESSOR = 8
_AXES = 4

Axis = tuple[int, int, int]
"""Size, stride in the destination, stride in the source."""


@cache
def _kernel(itemsize: int) -> Kernel:
    return Kernel(_SOURCE, "copy_strided", ELEMENT=_ELEMENTS[itemsize])


def kernels(chip: Chip) -> list[Kernel]:
    """The kernels of this module, for tests that compile them."""
    return [_kernel(itemsize) for itemsize in _ELEMENTS]


def copy_strided(
    backend: CudaBackend,
    dst: int,
    dst_strides: Sequence[int],
    src: int,
    src_strides: Sequence[int],
    shape: Sequence[int],
    itemsize: int,
) -> None:
    """Copy elements of 1, 2, 4 or 8 bytes; the views may overlap."""
    count = math.prod(shape)
    if count == 0:
        return
    if _overlap(dst, dst_strides, src, src_strides, shape, itemsize):
        straight = layout.contiguous_strides(tuple(shape))
        spare = backend.spare(count * itemsize)
        copy_strided(backend, spare.address, straight, src, src_strides, shape, itemsize)
        src, src_strides = spare.address, straight
    axes = _merged(zip(shape, dst_strides, src_strides, strict=True))
    outer, inner = axes[:-_AXES], axes[-_AXES:]
    for place in itertools.product(*(range(size) for size, _, _ in outer)):
        dst_offset = sum(i * axis[1] for i, axis in zip(place, outer, strict=True))
        src_offset = sum(i * axis[2] for i, axis in zip(place, outer, strict=True))
        _copy(backend, dst + dst_offset * itemsize, src + src_offset * itemsize, inner, itemsize)


def _copy(backend: CudaBackend, dst: int, src: int, axes: list[Axis], itemsize: int) -> None:
    axes = [(1, 0, 0)] * (_AXES - len(axes)) + axes
    sizes, dst_strides, src_strides = zip(*axes, strict=True)
    count = math.prod(sizes)
    blocks = min(-(-count // _THREADS), backend.driver.chip.multiprocessors * _MAX_BLOCKS_PER_MULTIPROCESSOR)
    launch_on(
        backend.device,
        _kernel(itemsize),
        blocks,
        _THREADS,
        dst,
        src,
        count,
        *sizes[1:],
        *dst_strides,
        *src_strides,
    )


def _merged(axes: Iterable[Axis]) -> list[Axis]:
    """The same elements in the same order with as few axes as possible."""
    merged: list[Axis] = []
    for size, dst_stride, src_stride in axes:
        if size == 1:
            continue
        if merged and merged[-1][1:] == (size * dst_stride, size * src_stride):
            merged[-1] = (merged[-1][0] * size, dst_stride, src_stride)
        else:
            merged.append((size, dst_stride, src_stride))
    return merged


def _overlap(
    dst: int,
    dst_strides: Sequence[int],
    src: int,
    src_strides: Sequence[int],
    shape: Sequence[int],
    itemsize: int,
) -> bool:
    first, last = layout.extent(tuple(shape), tuple(dst_strides))
    dst_begin, dst_end = dst + first * itemsize, dst + (last + 1) * itemsize
    first, last = layout.extent(tuple(shape), tuple(src_strides))
    return dst_begin < src + (last + 1) * itemsize and src + first * itemsize < dst_end
