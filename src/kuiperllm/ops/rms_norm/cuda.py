"""Launches the CUDA kernels of `rms_norm`: a block for each wide row, a warp for each narrow one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.backends.cuda.rows import vector_width
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.contract import ACTIVATIONS
from kuiperllm.ops.grid import rows

DTYPES = ACTIVATIONS

_SOURCE = Path(__file__).with_name("cuda.cu")
_ITEMS_OF_A_WARP = 2  # pieces of a row that a lane holds before the row gets more than one warp
_MAX_WARPS = 16
_MANY_ROWS = 264  # two for each multiprocessor of a large GPU: from here on, rows hide each other's latency
_MAX_WARPS_OF_MANY = 4
_WIDEST_OF_MANY = 4096  # wider rows would take too many registers
_ROWS_OF_A_BLOCK = 4


class _Plan(NamedTuple):
    """How rows of one width are cut up."""

    kernel: Kernel
    rows: int
    """Rows of a block."""
    threads: int
    """Threads of a block."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Rows of x [..., D] to rows of out."""
    if not x.numel:
        return
    width = x.shape[-1]
    count = x.numel // width
    inner, *x_strides = rows(x)
    _, *out_strides = rows(out)
    step = vector_width(width, x.dtype, x, weight, out)
    plan = _plan("rms_norm", x.dtype, width, step, count >= _MANY_ROWS)
    launch(
        plan.kernel, -(-count // plan.rows), plan.threads,
        x, weight, out, count, width, eps, inner, *x_strides, *out_strides,
    )  # fmt: skip


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Rows of x [T, D], added to rows of the residual, to rows of out."""
    if not x.numel:
        return
    count, width = x.shape
    step = vector_width(width, x.dtype, residual, x, weight, out)
    plan = _plan("add_rms_norm", x.dtype, width, step, count >= _MANY_ROWS)
    launch(
        plan.kernel, -(-count // plan.rows), plan.threads,
        residual, x, weight, out, count, width, eps, residual.strides[0], x.strides[0], out.strides[0],
    )  # fmt: skip


@cache
def _plan(name: str, dtype: DType, width: int, step: int, many: bool) -> _Plan:
    """The fewest threads that hold a row in as few pieces as possible, so that none of them idles.

    One row is done soonest by many warps with a piece each. Of many rows, several have to be under way on a
    multiprocessor, and its barriers cost the less the fewer warps they hold up (see docs/profiling.md).
    """
    most = _MAX_WARPS_OF_MANY if many and width <= _WIDEST_OF_MANY else _MAX_WARPS
    pieces = -(-width // step)
    if pieces <= 32 * _ITEMS_OF_A_WARP:
        warps, rows_of_block, items = 1, _ROWS_OF_A_BLOCK, -(-pieces // 32)
    else:
        items = -(-pieces // (32 * most))
        warps, rows_of_block = -(-pieces // (32 * items)), 1
    kernel = Kernel(_SOURCE, name, T=dtype, WIDTH=step, WARPS=warps, ITEMS=items, ROWS=rows_of_block)
    return _Plan(kernel, rows_of_block, 32 * warps * rows_of_block)
