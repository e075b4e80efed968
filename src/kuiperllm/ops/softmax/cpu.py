"""Launches the CPU kernel of `softmax`: one work item for each row."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor
from kuiperllm.ops.grid import grain

_SOFTMAX = Kernel("kuiperllm.ops.softmax.cpu_kernel", "softmax")


def softmax(x: Tensor, out: Tensor) -> None:
    """Rows of x [T, V] to rows of out."""
    tokens, width = x.shape
    launch(_SOFTMAX, x, out, width, x.strides[0], out.strides[0], items=tokens, grain=grain(2 * width))
