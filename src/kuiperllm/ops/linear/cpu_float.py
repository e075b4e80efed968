"""Launches the CPU kernels that multiply in floating point; x is float32, or rounded to bfloat16."""

from __future__ import annotations

from functools import cache

import numpy as np

from kuiperllm.backends.cpu.features import target
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.cpu_pack import scheme_parameters
from kuiperllm.ops.linear.cpu_work import (
    ROUND_MODULE,
    bias_of,
    blocks_of,
    grain_of,
    in_order_of,
    pairs_of,
    row_grain,
)
from kuiperllm.ops.linear.weight import LinearWeight, WeightFormat
from kuiperllm.quant import Scheme

_MODULE = "kuiperllm.ops.linear.cpu_float_kernel"
_AMX_MODULE = "kuiperllm.ops.linear.cpu_amx_kernel"
_FORMATS = {DType.float32: 0, DType.float16: 1, DType.bfloat16: 2}
_CODES = 3
_SLICE_BYTES = 8192  # of a row of W that a pass over x works on: 32 rows of it fit the second-level cache


def linear_float(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    """y = x W^T + bias, with weights of floating point or e4m3 codes."""
    x = in_order_of(x, weight)
    tokens, k = x.shape
    n, format = weight.out_features, weight.format
    sizes = n, k
    start = int(weight.bias is not None), int(accumulate)
    if tokens == 1:
        items = blocks_of(n)
        operands = weight.data, x, bias_of(weight), out
        kernel = _gemv(format)
        launch(kernel, *operands, *sizes, *start, items=items, grain=grain_of(items), in_long_runs=True)
    else:
        items = pairs_of(n)
        columns = _slice_columns(format, DType.float32)
        launch(
            _gemm(format),
            *(weight.data, x, bias_of(weight), out, _panels(format, columns, DType.float32)),
            *(tokens, *sizes, x.strides[0], out.strides[0], *start),
            items=items,
            grain=min(16, 2 * grain_of(items)),
        )


def gemm_bf16(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    """The same with x in bfloat16, by the dot product of pairs."""
    x = in_order_of(x, weight)
    tokens, k = x.shape
    items = pairs_of(weight.out_features)
    rounded = Tensor.empty((tokens, k), DType.bfloat16)
    launch(_ROUND_ROWS, x, rounded, k, x.strides[0], items=tokens, grain=row_grain(k))
    columns = _slice_columns(weight.format, DType.bfloat16)
    launch(
        _gemm_bf16(weight.format),
        *(weight.data, rounded, bias_of(weight), out),
        _panels(weight.format, columns, DType.bfloat16),
        *(tokens, weight.out_features, k, out.strides[0], int(weight.bias is not None), int(accumulate)),
        items=items,
        grain=min(16, 2 * grain_of(items)),
    )


def _slice_columns(format: WeightFormat, expanded: DType) -> int:
    """Columns that a pass works on; codes are expanded first."""
    return _SLICE_BYTES // (format if isinstance(format, DType) else expanded).itemsize


def _panels(format: WeightFormat, columns: int, dtype: DType) -> Tensor:
    """Room for two blocks of expanded codes for each thread."""
    return Tensor.empty((num_threads() * 2 * columns * 16 if isinstance(format, Scheme) else 0,), dtype)


_ROUND_ROWS = Kernel(ROUND_MODULE, "round_rows")


@cache
def _gemv(format: WeightFormat) -> Kernel:
    if isinstance(format, Scheme):
        return Kernel(_MODULE, "gemv_e4m3", **scheme_parameters(format))
    return Kernel(_MODULE, "gemv_float", FORMAT=_FORMATS[format])


@cache
def _gemm(format: WeightFormat) -> Kernel:
    rows = 6 if target().at_least("avx512") else 2
    columns = _slice_columns(format, DType.float32)
    return Kernel(_MODULE, "gemm_float", **_format_parameters(format), ROWS=rows, SLICE=columns)


@cache
def _gemm_bf16(format: WeightFormat) -> Kernel:
    columns = _slice_columns(format, DType.bfloat16)
    return Kernel(_MODULE, "gemm_bf16", **_format_parameters(format, pairs=True), ROWS=8, SLICE=columns)


def _format_parameters(format: WeightFormat, *, pairs: bool = False) -> dict[str, int]:
    if isinstance(format, Scheme):
        return {"FORMAT": _CODES, "PAIRS": pairs, **scheme_parameters(format)}
    return {"FORMAT": _FORMATS[format]}


# --- AMX --------------------------------------------------------------------------------------------------

_AMX_ROWS = 512  # rows of x at a time: their tiles and sums stay in the second-level cache
_AMX_GRAIN = 4
_AMX_SLICE = 512
_TILE_ROWS = Kernel(_AMX_MODULE, "tile_rows")


def gemm_amx(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    """The same with x in bfloat16, by matrix tiles; any codes are expanded to bfloat16."""
    x = in_order_of(x, weight)
    k, pairs = weight.in_features, pairs_of(weight.out_features)
    kernel = _gemm_amx(weight.format)
    grain = min(_AMX_GRAIN, 2 * grain_of(pairs))
    for first in range(0, x.shape[0], _AMX_ROWS):
        rows, to = x[first : first + _AMX_ROWS], out[first : first + _AMX_ROWS]
        tokens = rows.shape[0]
        padded = -(-tokens // 32) * 32
        tiles = Tensor.empty((padded, k), DType.bfloat16)
        launch(_TILE_ROWS, rows, tiles, tokens, k, rows.strides[0], items=padded, grain=row_grain(k))
        scratch_bytes = 2 * _AMX_SLICE * 16 * 2 + grain * padded * 32 * 4
        scratch = Tensor.empty((num_threads(), scratch_bytes), DType.uint8)
        launch(
            kernel,
            *(weight.data, tiles, bias_of(weight), to, scratch, _amx_config()),
            *(tokens, weight.out_features, k, to.strides[0], scratch_bytes),
            *(int(weight.bias is not None), int(accumulate)),
            items=pairs,
            grain=grain,
        )


@cache
def _gemm_amx(format: WeightFormat) -> Kernel:
    parameters = _format_parameters(format, pairs=True)
    return Kernel(_AMX_MODULE, "gemm_amx", **parameters, SLICE=_AMX_SLICE)


@cache
def _amx_config() -> Tensor:
    """The shapes of the tile registers: all eight 16 rows of 64 bytes (palette 1)."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = 64
    config[48:56] = 16
    return Tensor.from_numpy(config)
