"""Overlapping windows of a tensor, as a view."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError


def windows(x: Tensor, size: int, step: int = 1) -> Tensor:
    """Pieces of `size` entries along the first axis, `step` apart, which share memory where they overlap.

    Args:
        x: [N, ...].
        size: entries of a window, from 1 to N.
        step: from the start of one window to the next.

    Returns:
        [W, size, ...]: all windows that lie within x, on the same memory.

    Raises:
        ShapeError: no window of that size fits, or the step is not positive.
    """
    if not 1 <= size <= x.shape[0] or step < 1:
        raise ShapeError(f"shape {list(x.shape)}: no windows of {size} entries every {step}")
    count = (x.shape[0] - size) // step + 1
    stride = x.strides[0]
    return Tensor(
        x.buffer, x.dtype, (count, size, *x.shape[1:]), (step * stride, stride, *x.strides[1:]), x.offset
    )
