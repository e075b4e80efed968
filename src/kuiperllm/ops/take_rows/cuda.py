"""Launches the CUDA kernel of `take_rows`."""

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


def take_rows(x: Tensor, rows: Tensor, out: Tensor) -> None:
    """Rows of x [T, D] to rows of out [S, D]."""
    (tokens, width), count = x.shape, rows.shape[0]
    step = vector_width(width, x.dtype, x, out)
    launch(
        _kernel(x.dtype, step), grid(-(-width // step), count, _BLOCK), _BLOCK,
        x, rows, out, tokens, count, width, x.strides[0], out.strides[0],
    )  # fmt: skip


@cache
def _kernel(dtype: DType, step: int) -> Kernel:
    return Kernel(_SOURCE, "take_rows", T=dtype, WIDTH=step)
