"""Launches the CPU kernels of `rms_norm`: one work item for each row."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor
from kuiperllm.ops.grid import grain, rows

_RMS_NORM = Kernel("kuiperllm.ops.rms_norm.cpu_kernel", "rms_norm")
_ADD_RMS_NORM = Kernel("kuiperllm.ops.rms_norm.cpu_kernel", "add_rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Rows of x [..., D] to rows of out."""
    width = x.shape[-1]
    inner, *x_strides = rows(x)
    _, *out_strides = rows(out)
    items = x.numel // width if width else 0
    launch(
        _RMS_NORM, x, weight, out, width, eps, inner, *x_strides, *out_strides,
        items=items, grain=grain(width),
    )  # fmt: skip


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Rows of x [T, D], added to rows of the residual, to rows of out."""
    tokens, width = x.shape
    strides = residual.strides[0], x.strides[0], out.strides[0]
    launch(_ADD_RMS_NORM, residual, x, weight, out, width, eps, *strides, items=tokens, grain=grain(width))
