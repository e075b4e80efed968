"""Launches the CPU kernel of `relu_squared`."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor
from kuiperllm.ops.grid import grain

_RELU_SQUARED = Kernel("kuiperllm.ops.relu_squared.cpu_kernel", "relu_squared")


def relu_squared(x: Tensor, out: Tensor) -> None:
    """One work item for each row."""
    tokens, width = x.shape
    launch(
        _RELU_SQUARED, x, out, width, x.strides[0], out.strides[0],
        items=tokens, grain=grain(width),
    )  # fmt: skip
