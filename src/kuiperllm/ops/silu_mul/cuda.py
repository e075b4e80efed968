"""Launches the CUDA kernel of `silu_mul`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.backends.cuda.rows import grid, vector_width
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.contract import ACTIVATIONS

DTYPES = ACTIVATIONS

_SOURCE = Path(__file__).with_name("cuda.cu")
_BLOCK = 256


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """One thread for each vector of 16 bytes of out, or each element where rows are not made of such."""
    rows, width = out.shape
    step = vector_width(width, out.dtype, gate_up, out)
    launch(
        _kernel(out.dtype, step), grid(-(-width // step), rows, _BLOCK), _BLOCK,
        gate_up, out, rows, width, gate_up.strides[0], out.strides[0],
    )  # fmt: skip


@cache
def _kernel(dtype: DType, step: int) -> Kernel:
    return Kernel(_SOURCE, "silu_mul", T=dtype, WIDTH=step)
