"""Launches the CPU kernels of `linear`: one row or several, by weight format and processor level."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.backends.cpu.features import target
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.weight import LinearWeight, PackedSizes, Rounding, Rows, WeightFormat, check_rounded
from kuiperllm.quant import SUPER_BLOCK, QuantTensor, Scheme

_MODULE = "kuiperllm.ops.linear.cpu_kernel"
_FLOAT_FORMATS = {DType.float32: 0, DType.float16: 1, DType.bfloat16: 2}
_SLICE_BYTES = 8192  # of a row of W that a pass over x works on: 32 rows of it fit the second-level cache
_PIECE_BYTES = 8 << 20  # of rows, in float32, that are laid out at a time


def linear(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    """y = x W^T + bias; see `kuiperllm.ops.linear`."""
    if x.shape[0] == 0:
        return
    if _uses_amx(weight.format, *x.shape):
        _gemm_amx(x, weight, out, accumulate)
    elif isinstance(weight.format, Scheme):
        _linear_q8(x, weight, out, accumulate)
    elif _uses_bf16_dot(weight.format, *x.shape):
        _gemm_bf16(x, weight, out, accumulate)
    else:
        _linear_float(x, weight, out, accumulate)


def _uses_amx(format: WeightFormat, tokens: int, k: int) -> bool:
    takes = format is DType.bfloat16 or isinstance(format, Scheme)
    return tokens > 1 and takes and k % 32 == 0 and target().at_least("amx")


def _uses_bf16_dot(format: WeightFormat, tokens: int, k: int) -> bool:
    return tokens > 1 and format is DType.bfloat16 and k % 16 == 0 and target().has_bf16


def rounding(format: WeightFormat, tokens: int, k: int) -> Rounding:
    """What x is rounded to before it is multiplied: int8 groups, bfloat16, or nothing."""
    if _uses_amx(format, tokens, k) or _uses_bf16_dot(format, tokens, k):
        return DType.bfloat16
    return format.group_size if isinstance(format, Scheme) else None


def activation_dtype(format: WeightFormat) -> DType:
    """float32: the CPU's vectors are as wide as its memory is fast."""
    return DType.float32


# --- int8 groups ------------------------------------------------------------------------------------------


def _linear_q8(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    tokens, k = x.shape
    n, group = weight.out_features, weight.group_size
    assert weight.scales is not None
    xq = Tensor.empty((tokens, k), DType.int8)
    xs = Tensor.empty((tokens, k // group), DType.float32)
    xz = Tensor.empty((tokens, k // group), DType.int32)
    rows = max(1, 8192 // k)
    launch(_quantize_rows(group), x, xq, xs, xz, k, x.strides[0], items=tokens, grain=rows)
    half = weight.scales.dtype is DType.float16
    pairs = _pairs(n)
    common = (weight.data, weight.scales, xq, xs, xz, _bias(weight), out)
    if tokens == 1:
        kernel = _gemv_q8(group, half, weight.bias is not None, accumulate)
        launch(kernel, *common, n, k, items=pairs, grain=_grain(pairs))
    else:
        kernel = _gemm_q8(group, half, weight.bias is not None, accumulate)
        launch(kernel, *common, tokens, n, k, out.strides[0], items=pairs, grain=min(16, _grain(pairs)))


@cache
def _quantize_rows(group: int) -> Kernel:
    return Kernel(_MODULE, "quantize_rows", GROUP=group)


@cache
def _gemv_q8(group: int, half: bool, bias: bool, accumulate: bool) -> Kernel:
    return Kernel(
        _MODULE, "gemv_q8", GROUP=group, HALF_SCALES=half, BIAS=bias, ACCUMULATE=accumulate
    )  # fmt: skip


@cache
def _gemm_q8(group: int, half: bool, bias: bool, accumulate: bool) -> Kernel:
    rows = 6 if target().at_least("avx512") else 2
    return Kernel(
        _MODULE,
        "gemm_q8",
        GROUP=group,
        HALF_SCALES=half,
        BIAS=bias,
        ACCUMULATE=accumulate,
        ROWS=rows,
        SLICE=_SLICE_BYTES,
    )


# --- floating point ---------------------------------------------------------------------------------------


def _linear_float(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    tokens, k = x.shape
    n, pairs = weight.out_features, _pairs(weight.out_features)
    assert isinstance(weight.format, DType)
    common = (weight.data, x, _bias(weight), out)
    if tokens == 1:
        kernel = _float_kernel("gemv_float", weight.format, weight.bias is not None, accumulate)
        launch(kernel, *common, n, k, items=pairs, grain=_grain(pairs))
    else:
        kernel = _float_kernel("gemm_float", weight.format, weight.bias is not None, accumulate)
        strides = x.strides[0], out.strides[0]
        launch(kernel, *common, tokens, n, k, *strides, items=pairs, grain=min(16, _grain(pairs)))


@cache
def _float_kernel(name: str, format: DType, bias: bool, accumulate: bool) -> Kernel:
    rows = 6 if target().at_least("avx512") else 2
    return Kernel(
        _MODULE,
        name,
        FORMAT=_FLOAT_FORMATS[format],
        BIAS=bias,
        ACCUMULATE=accumulate,
        ROWS=rows,
        SLICE=_SLICE_BYTES // format.itemsize,
    )


def _gemm_bf16(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    tokens, k = x.shape
    pairs = _pairs(weight.out_features)
    xb = Tensor.empty((tokens, k), DType.bfloat16)
    launch(_ROUND_ROWS, x, xb, k, x.strides[0], items=tokens, grain=max(1, 8192 // k))
    launch(
        _bf16_kernel(weight.bias is not None, accumulate),
        *(weight.data, xb, _bias(weight), out, tokens, weight.out_features, k, out.strides[0]),
        items=pairs,
        grain=min(16, _grain(pairs)),
    )


_ROUND_ROWS = Kernel(_MODULE, "round_rows")


@cache
def _bf16_kernel(bias: bool, accumulate: bool) -> Kernel:
    return Kernel(
        _MODULE, "gemm_bf16", BIAS=bias, ACCUMULATE=accumulate, ROWS=8, SLICE=_SLICE_BYTES // 2
    )  # fmt: skip


# --- AMX --------------------------------------------------------------------------------------------------

_AMX_MODULE = "kuiperllm.ops.linear.cpu_amx_kernel"
_AMX_ROWS = 512  # rows of x at a time: their tiles and sums stay in the second-level cache
_AMX_GRAIN = 4
_AMX_SLICE = 512
_TILE_ROWS = Kernel(_AMX_MODULE, "tile_rows")


def _gemm_amx(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    k, pairs = weight.in_features, _pairs(weight.out_features)
    half = weight.scales is None or weight.scales.dtype is DType.float16
    kernel = _amx_kernel(weight.group_size, half, weight.bias is not None, accumulate)
    grain = min(_AMX_GRAIN, _grain(pairs))
    for first in range(0, x.shape[0], _AMX_ROWS):
        rows, to = x[first : first + _AMX_ROWS], out[first : first + _AMX_ROWS]
        tokens = rows.shape[0]
        padded = -(-tokens // 32) * 32
        tiles = Tensor.empty((padded, k), DType.bfloat16)
        launch(_TILE_ROWS, rows, tiles, tokens, k, rows.strides[0], items=padded, grain=max(1, 8192 // k))
        scratch = Tensor.empty(
            (num_threads(), 2 * _AMX_SLICE * 16 * 2 + grain * padded * 32 * 4), DType.uint8
        )
        launch(
            kernel,
            *(weight.data, weight.data if weight.scales is None else weight.scales, tiles, _bias(weight), to),
            *(scratch, _amx_config(), tokens, weight.out_features, k, to.strides[0], scratch.strides[0]),
            items=pairs,
            grain=grain,
        )


@cache
def _amx_kernel(group: int, half: bool, bias: bool, accumulate: bool) -> Kernel:
    return Kernel(
        _AMX_MODULE,
        "gemm_amx",
        GROUP=group,
        HALF_SCALES=half,
        BIAS=bias,
        ACCUMULATE=accumulate,
        SLICE=_AMX_SLICE,
    )


@cache
def _amx_config() -> Tensor:
    """The shapes of the tile registers: all eight 16 rows of 64 bytes (palette 1)."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = 64
    config[48:56] = 16
    return Tensor.from_numpy(config)


# --- how work is cut up ------------------------------------------------------------------------------------


def _pairs(n: int) -> int:
    """Pairs of blocks of 16 outputs: the work items of every kernel."""
    return (n + 31) // 32


def _grain(pairs: int) -> int:
    """Items claimed at a time: enough for prefetching to pay, few enough that threads end together."""
    return max(1, pairs // (32 * num_threads()))


def _bias(weight: LinearWeight) -> Tensor:
    """The bias, or any address at all for kernels that were compiled without one."""
    return weight.data if weight.bias is None else weight.bias


# --- packing -----------------------------------------------------------------------------------------------


def packed_sizes(format: WeightFormat, n: int, k: int) -> PackedSizes:
    """Memory of an [N, K] matrix: N rounded up to a multiple of 16."""
    rows = (n + 15) // 16 * 16
    if isinstance(format, Scheme):
        each = 2 if format.has_zeros else 1
        super_blocks = k // SUPER_BLOCK if format.has_super_blocks else 0
        return PackedSizes(
            rows * (k * format.bits // 8),
            rows * (k // format.group_size) * each,
            rows * super_blocks * each,
            rows,
        )
    row_bytes = (k + 1) // 2 * 4 if format is DType.bfloat16 else k * format.itemsize
    return PackedSizes(rows * row_bytes, 0, 0, rows)


def write_rows(weight: LinearWeight, first: int, rows: Rows) -> None:
    """Lay out rows `first` and on; see `LinearWeight.write_rows`.

    They are laid out piece by piece, because a piece may have to be copied or converted first.
    """
    n, k = rows.shape
    step = max(16, _PIECE_BYTES // (4 * k) // 16 * 16)
    for start in range(0, n, step):
        part = slice(start, start + step)
        if isinstance(rows, QuantTensor):
            _pack_rows(weight, first + start, rows.codes[part].unpack())
            _write_scales(weight, first + start, rows.scales[part])
        elif isinstance(weight.format, Scheme):
            _quantize_rows_of(weight, first + start, rows[part])
        else:
            _pack_rows(weight, first + start, rows[part].astype(weight.format.numpy, copy=False))


def _pack_rows(weight: LinearWeight, first: int, values: NDArray[Any]) -> None:
    n, k = values.shape
    if weight.format is DType.bfloat16 and k % 2:
        values = np.pad(values.view(np.uint16), ((0, 0), (0, 1)))
    source = Tensor.from_numpy(np.ascontiguousarray(values).view(np.uint8))
    row_bytes = source.shape[1]
    packed = weight.data[first * row_bytes :]
    if weight.format is DType.float16:
        launch(_PACK_HALVES, source, packed, n, k, items=(n + 15) // 16)
    else:
        launch(_PACK_WORDS, source, packed, n, row_bytes // 4, 0, items=(n + 15) // 16)


def _quantize_rows_of(weight: LinearWeight, first: int, rows: NDArray[Any]) -> None:
    assert weight.scales is not None
    n, k = rows.shape
    scratch = Tensor.empty((num_threads(), weight.group_size), DType.int8)
    failed = Tensor.zeros((1,), DType.int32)
    launch(
        Kernel(
            _MODULE, "quantize_pack", GROUP=weight.group_size, FORMAT=_FLOAT_FORMATS[DType.of(rows.dtype)]
        ),
        Tensor.from_numpy(np.ascontiguousarray(rows).view(np.uint8)),
        weight.data[first * k :],
        weight.scales[first * (k // weight.group_size) :],
        *(scratch, failed, n, k),
        items=(n + 15) // 16,
    )
    check_rounded(int(failed.item()))


def _write_scales(weight: LinearWeight, first: int, stored: NDArray[Any]) -> None:
    assert weight.scales is not None
    n, groups = stored.shape
    scales = np.ascontiguousarray(stored, weight.scales.dtype.numpy)
    packed = weight.scales[first * groups :]
    if weight.scales.dtype is DType.float16:
        launch(_PACK_HALVES, Tensor.from_numpy(scales), packed, n, groups, items=(n + 15) // 16)
    else:
        launch(_PACK_WORDS, Tensor.from_numpy(scales), packed, n, groups, 0, items=(n + 15) // 16)


_PACK_WORDS = Kernel(_MODULE, "pack_words")
_PACK_HALVES = Kernel(_MODULE, "pack_halves")
