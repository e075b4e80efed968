"""Launches the CPU kernel of `silu_mul`: a row is split into blocks, so that threads share a single one."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor
from kuiperllm.ops.grid import grain

_SILU_MUL = Kernel("kuiperllm.ops.silu_mul.cpu_kernel", "silu_mul")
_BLOCK = 1024


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Columns 0 to F and F to 2F of gate_up to columns of out [T, F]."""
    tokens, width = out.shape
    blocks = -(-width // _BLOCK)
    launch(
        _SILU_MUL, gate_up, out, width, _BLOCK, blocks, gate_up.strides[0], out.strides[0],
        items=tokens * blocks, grain=grain(2 * _BLOCK),
    )  # fmt: skip
