"""Launches the CPU kernels of `rope`: one work item for each token."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor
from kuiperllm.ops.grid import grain

_MODULE = "kuiperllm.ops.rope.cpu_kernel"
_SPLIT = Kernel(_MODULE, "rope_split")
_INTERLEAVED = Kernel(_MODULE, "rope_interleaved")


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """Turn the heads of x [T, H, d] in place."""
    tokens, heads, width = x.shape
    launch(
        _INTERLEAVED if interleaved else _SPLIT,
        x, positions, cos_sin, heads, width // 2, cos_sin.shape[0],
        x.strides[0], x.strides[1], cos_sin.strides[0],
        items=tokens if cos_sin.shape[0] else 0, grain=grain(heads * width),
    )  # fmt: skip
