"""Launches the CPU kernels that multiply quantized weights by the int8 dot product."""

from __future__ import annotations

from functools import cache

from kuiperllm.backends.cpu.features import target
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.cpu_pack import padded_columns
from kuiperllm.ops.linear.cpu_work import (
    ROUND_MODULE,
    bias_of,
    blocks_of,
    grain_of,
    pairs_of,
    row_grain,
    scales_of,
    scheme_parameters,
)
from kuiperllm.ops.linear.weight import LinearWeight
from kuiperllm.quant import Scheme

X_GROUP = 32
"""Columns of x that share a multiplier, unless the groups of the weights are larger."""

_SLICE = 2048  # columns of a panel: two blocks of them fit the second-level cache beside the rows of x


def linear_codes(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    """y = x W^T + bias, with x in int8 groups."""
    scheme, tokens, n = weight.scheme, x.shape[0], weight.out_features
    assert scheme is not None
    operands = weight.data, *scales_of(weight), *_round(x, weight, scheme), bias_of(weight), out
    sizes = (
        *(tokens, n, padded_columns(weight.in_features), out.strides[0]),
        *(int(weight.bias is not None), int(accumulate)),
    )
    if tokens <= _few_rows()[-1]:
        rows = next(rows for rows in _few_rows() if rows >= tokens)
        items = blocks_of(n)
        launch(_gemv(scheme, rows), *operands, *sizes, items=items, grain=grain_of(items))
    else:
        each = 2 if scheme.has_zeros else 1
        panel_bytes = 2 * _SLICE * 16 + _rows_of_tile() * 128 + 2 * (_SLICE // scheme.group_size) * each * 64
        panels = Tensor.empty((num_threads(), panel_bytes), DType.uint8)
        items = pairs_of(n)
        launch(
            _gemm(scheme),
            *(*operands, panels, *sizes, panel_bytes),
            items=items,
            grain=min(16, 2 * grain_of(items)),
        )


def _few_rows() -> tuple[int, ...]:
    """Rows of x that a kernel for few of them takes: what registers allow."""
    return (1, 2, 4, 8) if target().at_least("avx512") else (1, 2, 4)


def _rows_of_tile() -> int:
    """Rows of x in a register tile of the kernel for many of them."""
    return 6 if target().at_least("avx512") else 2


def _round(x: Tensor, weight: LinearWeight, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in int8 groups: values, multipliers, sums, units; see `cpu_round_kernel.round_to_int8`."""
    tokens, width = x.shape
    k, group, columns = padded_columns(width), scheme.group_size, weight.columns
    values = Tensor.empty((tokens, k), DType.int8)
    multipliers = Tensor.empty((tokens, k // max(group, X_GROUP)), DType.int32)
    sums = Tensor.empty((tokens, k // group), DType.int32)
    units = Tensor.empty((tokens,), DType.float32)
    launch(
        _round_to_int8(group, columns is not None),
        *(x, x if columns is None else columns, values, multipliers, sums, units, width, x.strides[0]),
        *(-scheme.middle if scheme.coding == "middle" else -1, int(scheme.coding == "minimum")),
        items=tokens,
        grain=row_grain(k),
    )
    return values, multipliers, sums, units


@cache
def _round_to_int8(group: int, ordered: bool) -> Kernel:
    return Kernel(ROUND_MODULE, "round_to_int8", GROUP=group, ORDERED=ordered)


@cache
def _gemv(scheme: Scheme, rows: int) -> Kernel:
    return Kernel(
        "kuiperllm.ops.linear.cpu_gemv_kernel",
        "gemv_codes",
        **scheme_parameters(scheme),
        ROWS=rows,
        CHAINS=1 if rows > 2 else 2,
    )


@cache
def _gemm(scheme: Scheme) -> Kernel:
    return Kernel(
        "kuiperllm.ops.linear.cpu_gemm_kernel",
        "gemm_codes",
        **scheme_parameters(scheme),
        ROWS=_rows_of_tile(),
        SLICE=_SLICE,
    )
