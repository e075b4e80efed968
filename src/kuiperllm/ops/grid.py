"""How launchers cut tensors into work items."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError

GRAIN_ELEMENTS = 8192
"""Elements that are worth waking a thread for: about a microsecond of reading."""


def rows(x: Tensor) -> tuple[int, int, int]:
    """The rows [..., D] of a tensor of one to three axes as a grid: (inner, outer stride, inner stride).

    Row i starts at element (i // inner) * outer stride + (i % inner) * inner stride.

    Raises:
        ShapeError: more than three axes.
    """
    strides = x.strides
    if len(strides) == 2:
        return 1, strides[0], 0
    if len(strides) == 3:
        return x.shape[1], strides[0], strides[1]
    if len(strides) == 1:
        return 1, 0, 0
    raise ShapeError(f"shape {list(x.shape)}: rows lie along one to three axes; reshape() it first")


def grain(elements: int) -> int:
    """Work items of `elements` elements that a thread should claim at a time."""
    return max(1, GRAIN_ELEMENTS // max(1, elements))
