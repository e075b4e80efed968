"""Launches the CPU kernel of `gelu_mul`: a row is split into blocks, so that threads share a single one."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor
from kuiperllm.ops.grid import grain

_GELU_MUL = Kernel("kuiperllm.ops.gelu_mul.cpu_kernel", "gelu_mul")
_BLOCK = 1024


def gelu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Columns 0 to F and F to 2F of gate_up to columns of out [T, F]."""
    tokens, width = out.shape
    blocks = -(-width // _BLOCK)
    launch(
        _GELU_MUL, gate_up, out, width, _BLOCK, blocks, gate_up.strides[0], out.strides[0],
        items=tokens * blocks, grain=grain(2 * _BLOCK),
    )  # fmt: skip
