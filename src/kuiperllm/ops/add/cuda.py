"""Launches the CUDA kernel of `add`."""

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


def add(x: Tensor, y: Tensor, out: Tensor) -> None:
    """One thread for each vector of 16 bytes, or each element where rows are not made of such."""
    rows, width = x.shape
    step = vector_width(width, x.dtype, x, y, out)
    launch(
        _kernel(x.dtype, step), grid(-(-width // step), rows, _BLOCK), _BLOCK,
        x, y, out, rows, width, x.strides[0], y.strides[0], out.strides[0],
    )  # fmt: skip


@cache
def _kernel(dtype: DType, step: int) -> Kernel:
    return Kernel(_SOURCE, "add", T=dtype, WIDTH=step)
