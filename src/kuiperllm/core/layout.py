"""Shapes and strides as plain tuples of integers: the arithmetic behind a tensor's views.

Strides count elements. An axis of size 0 or 1 may have any stride. Error messages begin with the shape that
they are about; the functions know no tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from types import EllipsisType

from kuiperllm.errors import ShapeError

Shape = tuple[int, ...]
Index = int | slice | EllipsisType | None

MAX_BYTES = (1 << 63) - 1


def integers(values: int | Sequence[int], what: str) -> Shape:
    """`values` as a tuple of integers; one integer counts as a sequence of one.

    Raises:
        ShapeError: one of them is no integer.
    """
    try:
        return tuple(map(operator.index, values if isinstance(values, Sequence) else (values,)))
    except TypeError:
        raise ShapeError(f"{what} {values!r}: must be integers") from None


def checked_shape(shape: int | Sequence[int], itemsize: int) -> Shape:
    """`shape` as a tuple of integers.

    Raises:
        ShapeError: a size is negative or no integer, or the elements need more than 2^63 bytes.
    """
    sizes = integers(shape, "shape")
    if sizes and min(sizes) < 0:
        raise ShapeError(f"shape {list(sizes)}: sizes must not be negative")
    if math.prod(sizes) * itemsize > MAX_BYTES:
        raise ShapeError(f"shape {list(sizes)}: too large, its bytes do not fit into 64 bits")
    return sizes


def contiguous_strides(shape: Shape) -> Shape:
    """The strides of elements that lie one after the other, the last axis fastest."""
    strides = [1] * len(shape)
    step = 1
    for axis in range(len(shape) - 1, 0, -1):
        step *= shape[axis] or 1
        strides[axis - 1] = step
    return tuple(strides)


def is_contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether the elements lie one after the other, the last axis fastest."""
    if 0 in shape:
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def extent(shape: Shape, strides: Shape) -> tuple[int, int]:
    """The lowest and the highest element that the view touches, relative to its first; (0, -1) if none."""
    if 0 in shape:
        return 0, -1
    steps = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0)


def checked_axis(axis: int, ndim: int, shape: Shape) -> int:
    """`axis` counted from the front.

    Raises:
        ShapeError: there are not so many axes.
    """
    if not -ndim <= axis < ndim:
        raise ShapeError(f"shape {list(shape)}: axis {axis} is out of range for {ndim} axes")
    return axis % ndim


def infer_size(shape: Shape, new_shape: Sequence[int]) -> Shape:
    """`new_shape` with a -1 replaced by what is left of the elements of `shape`.

    Raises:
        ShapeError: the number of elements differs, or more than one size is -1.
    """
    sizes = list(integers(new_shape, "shape"))
    numel = math.prod(shape)
    if sizes.count(-1) > 1 or any(size < -1 for size in sizes):
        raise ShapeError(f"shape {list(shape)}: cannot reshape to {sizes}: one size may be -1, none lower")
    if -1 in sizes:
        known = -math.prod(sizes)
        if known and numel % known == 0:
            sizes[sizes.index(-1)] = numel // known
    if math.prod(sizes) != numel or -1 in sizes:
        raise ShapeError(f"shape {list(shape)}: cannot reshape {numel} elements to {list(new_shape)}")
    return tuple(sizes)


def reshaped_strides(shape: Shape, strides: Shape, new_shape: Shape) -> Shape | None:
    """The strides that show the same elements, in the same order, in `new_shape`; None if none do.

    Both shapes have the same number of elements.
    """
    if 0 in shape:
        return contiguous_strides(new_shape)
    # Runs of axes that act as one: (elements, stride of the last), outermost first.
    runs: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    new_strides: list[int] = []
    left, stride = runs.pop() if runs else (1, 1)
    for size in reversed(new_shape):
        if left == 1 and size != 1 and runs:
            left, stride = runs.pop()
        if left % size:
            return None
        new_strides.append(stride)
        left //= size
        stride *= size
    return tuple(reversed(new_strides))


def indexed(shape: Shape, strides: Shape, index: Index | tuple[Index, ...]) -> tuple[int, Shape, Shape]:
    """Apply NumPy's basic indexing: the first element, the shape and the strides of the result.

    Raises:
        ShapeError: an index is out of range or of another kind, or there are too many.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    num_taken = sum(item is not None and item is not Ellipsis for item in items)
    if num_taken > len(shape):
        raise ShapeError(f"shape {list(shape)}: {num_taken} indices are too many")
    if sum(item is Ellipsis for item in items) > 1:
        raise ShapeError(f"shape {list(shape)}: an index may have one ellipsis only")
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    first, axis = 0, 0
    new_shape: list[int] = []
    new_strides: list[int] = []
    for item in items:
        if item is None:
            new_shape.append(1)
            new_strides.append(0)
        elif item is Ellipsis:
            end = axis + len(shape) - num_taken
            new_shape += shape[axis:end]
            new_strides += strides[axis:end]
            axis = end
        elif isinstance(item, slice):
            start, length, step = _slice_of(item, shape, axis)
            first += start * strides[axis]
            new_shape.append(length)
            new_strides.append(step * strides[axis])
            axis += 1
        else:
            first += _position_of(item, shape, axis) * strides[axis]
            axis += 1
    return first, tuple(new_shape), tuple(new_strides)


def _slice_of(item: slice, shape: Shape, axis: int) -> tuple[int, int, int]:
    try:
        start, stop, step = item.indices(shape[axis])
    except (TypeError, ValueError):
        raise ShapeError(
            f"shape {list(shape)}: {item} is no slice of integers with a step other than 0"
        ) from None
    length = len(range(start, stop, step))
    return start, length, step


def _position_of(item: object, shape: Shape, axis: int) -> int:
    if isinstance(item, bool):
        raise ShapeError(f"shape {list(shape)}: {item} is no index; use integers, slices, ... and None")
    try:
        position = operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        raise ShapeError(
            f"shape {list(shape)}: {type(item).__name__} is no index; use integers, slices, ... and None"
        ) from None
    size = shape[axis]
    if not -size <= position < size:
        raise ShapeError(f"shape {list(shape)}: index {position} is out of range for axis {axis}")
    return position % size
