"""Launches the CPU kernels that multiply quantized weights by the int8 dot product."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from kuiperllm.backends.cpu.features import target
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.cpu_pack import padded_columns, scheme_parameters
from kuiperllm.ops.linear.cpu_work import (
    ROUND_MODULE,
    bias_of,
    blocks_of,
    grain_of,
    pairs_of,
    row_grain,
)
from kuiperllm.ops.linear.weight import LinearWeight
from kuiperllm.quant import SUPER_BLOCK, Scheme

_CHUNK = 32
_SLICE = 1024  # columns of a panel: two blocks of them nearly fit the first-level cache


def x_group(scheme: Scheme, k: int) -> int:
    """Columns of x that share a scale; whole groups of the weights.

    Few bits lose so much that larger groups of x do not count, and save a multiplication for each group of
    the weights. With super-blocks x has groups of 256, as llama.cpp rounds it for these types.
    """
    if scheme.has_super_blocks:
        return SUPER_BLOCK
    if 128 % scheme.group_size:
        return scheme.group_size
    wanted = 128 if scheme.bits <= 4 else max(scheme.group_size, _CHUNK)
    return next(group for group in (128, 64, 32) if group <= wanted and padded_columns(k) % group == 0)


class Norm(NamedTuple):
    """An RMS norm that rows of x go through before they are rounded; see `ops.rms_norm`."""

    weight: Tensor
    eps: float


def linear_codes(
    x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool, norm: Norm | None = None
) -> None:
    """y = x W^T + bias, with x in int8 groups."""
    scheme, tokens, n = weight.scheme, x.shape[0], weight.out_features
    assert scheme is not None
    if tokens > _few_rows()[-1]:
        _multiply_many(x, weight, scheme, out, accumulate, norm, gated=False)
        return
    rows = next(rows for rows in _few_rows() if rows >= tokens)
    items = blocks_of(n)
    launch(
        _gemv(scheme, x_group(scheme, weight.in_features), rows),
        *_operands(x, weight, scheme, rows, norm),
        out,
        *_sizes(x, weight, out, accumulate),
        items=items,
        grain=grain_of(items),
        in_long_runs=True,
    )


def can_gate(x: Tensor, weight: LinearWeight) -> bool:
    """Whether `linear_codes_gated` takes these."""
    return x.shape[0] > _few_rows()[-1] and weight.out_features % 32 == 0


def linear_codes_gated(x: Tensor, weight: LinearWeight, out: Tensor, norm: Norm) -> None:
    """silu(gate) * other, where x W^T + bias, with x in int8 groups, is gate and other side by side."""
    assert weight.scheme is not None
    _multiply_many(x, weight, weight.scheme, out, False, norm, gated=True)


def _multiply_many(
    x: Tensor,
    weight: LinearWeight,
    scheme: Scheme,
    out: Tensor,
    accumulate: bool,
    norm: Norm | None,
    *,
    gated: bool,
) -> None:
    group, rows = x_group(scheme, weight.in_features), _rows_of_tile()
    columns = _slice_columns(group)
    records = columns // group * (group // scheme.group_size + _beside(scheme, group))
    panel_bytes = 2 * columns * 16 + 2 * records * 64 + (x.shape[0] + rows) * 128
    operands = _operands(x, weight, scheme, rows, norm)
    panels = Tensor.empty((num_threads(), panel_bytes), DType.uint8)
    launch(
        _gemm(scheme, group, gated),
        *operands,
        *(out, panels),
        *_sizes(x, weight, out, accumulate),
        panel_bytes,
        items=pairs_of(weight.out_features),
        in_long_runs=True,
    )


def _operands(
    x: Tensor, weight: LinearWeight, scheme: Scheme, rows: int, norm: Norm | None
) -> tuple[Tensor, ...]:
    """What both kinds of kernels read: weights, and x in int8 groups, in tiles of rows."""
    return weight.data, *_round(x, weight, scheme, rows, norm), bias_of(weight)


def _sizes(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> tuple[int, ...]:
    k = padded_columns(weight.in_features)
    has_bias = int(weight.bias is not None)
    return x.shape[0], weight.out_features, k, out.strides[0], has_bias, int(accumulate)


def _slice_columns(x_group: int) -> int:
    """Columns of a panel: whole groups of x."""
    return max(1, _SLICE // x_group) * x_group


def _beside(scheme: Scheme, group: int) -> int:
    """Vectors of a record of a panel beside the scales; see `cpu_gemm_kernel.expand_records`."""
    count = group // scheme.group_size
    if not scheme.has_zeros:
        return 0
    return count // 2 + 1 if scheme.has_super_blocks else count


def _few_rows() -> tuple[int, ...]:
    """Rows of x that a kernel for few of them takes: what registers allow."""
    return (1, 2, 4, 8) if target().at_least("avx512") else (1, 2, 4)


def _rows_of_tile() -> int:
    """Rows of x in a register tile of the kernel for many of them."""
    return 6 if target().at_least("avx512") else 2


def _round(
    x: Tensor, weight: LinearWeight, scheme: Scheme, rows: int, norm: Norm | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x in int8 groups, in tiles of rows: values, scales, sums; see `cpu_round_kernel.round_to_int8`."""
    tokens, width = x.shape
    padded = -(-tokens // rows) * rows
    k, columns = padded_columns(width), weight.columns
    group, pairs = x_group(scheme, width), _sums_in_pairs(scheme)
    values = Tensor.empty((padded, k), DType.int8)
    scales = Tensor.empty((padded, k // group), DType.float32)
    sums = Tensor.empty((padded, k // scheme.group_size // (2 if pairs else 1)), DType.int32)
    launch(
        _round_to_int8(scheme.group_size, group, pairs, columns is not None, norm is not None),
        *(x, x if columns is None else columns, x if norm is None else norm.weight, values, scales, sums),
        *(tokens, width, x.strides[0], rows, -scheme.middle if scheme.coding == "middle" else -1),
        0.0 if norm is None else norm.eps,
        items=padded,
        grain=-(-row_grain(k) // rows) * rows,  # whole tiles: their rows share cache lines
    )
    return values, scales, sums


def _sums_in_pairs(scheme: Scheme) -> bool:
    """Whether sums of x are multiplied by minimums of int8."""
    return scheme.coding == "minimum" and scheme.has_super_blocks


@cache
def _round_to_int8(group: int, x_group: int, pairs: bool, ordered: bool, norm: bool) -> Kernel:
    return Kernel(
        ROUND_MODULE,
        "round_to_int8",
        GROUP=group,
        XGROUP=x_group,
        PAIRS=pairs,
        ORDERED=ordered,
        NORM=norm,
    )


@cache
def _gemv(scheme: Scheme, x_group: int, rows: int) -> Kernel:
    return Kernel(
        "kuiperllm.ops.linear.cpu_gemv_kernel",
        "gemv_codes",
        **scheme_parameters(scheme),
        XGROUP=x_group,
        ROWS=rows,
        CHAINS=1 if rows > 2 else 2,
    )


@cache
def _gemm(scheme: Scheme, x_group: int, gated: bool) -> Kernel:
    return Kernel(
        "kuiperllm.ops.linear.cpu_gemm_kernel",
        "gemm_codes",
        **scheme_parameters(scheme),
        XGROUP=x_group,
        BESIDE=_beside(scheme, x_group),
        ROWS=_rows_of_tile(),
        SLICE=_slice_columns(x_group),
        GATED=gated,
    )
