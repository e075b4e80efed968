"""Rounding floating-point matrices to the codes of a scheme."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from kuiperllm.quant.codes import BYTES, INT8, CodeLayout, Codes, dense_layout, write_codes
from kuiperllm.quant.fitting import (
    Extent,
    Fit,
    Floats,
    by_rule,
    nonzero,
    scales_in_reach,
    searched,
    to_half,
    zero_points,
)
from kuiperllm.quant.scheme import SUPER_BLOCK, Scheme
from kuiperllm.quant.super_scales import refit, split
from kuiperllm.quant.tensor import QuantTensor

_HALF_MAX = float(np.finfo(np.float16).max)
# Elements that are rounded at a time: float32 working copies (256 KiB) stay in the second-level cache, and an
# embedding of a gigabyte needs no gigabytes beside it.
_CHUNK = 1 << 16


def quantize(
    w: NDArray[Any],
    scheme: Scheme,
    *,
    search: bool = False,
    importance: NDArray[np.float32] | None = None,
) -> QuantTensor:
    """Round a matrix [N, K] to codes.

    Without `search` the scale of a group follows from its largest weights. All arithmetic is float32, each
    operation rounded once; `rint` rounds halves to even; a scale is rounded to float16 (if the scheme stores
    that) before anything is divided by it, so that codes suit the scale that is stored.

    middle, 8 bits (q8): with a = max |w|,
        scale = a / 127; at most a = 127.5 scale;
        code = 128 + clamp(rint(w / scale), -127, 127).
    middle, b < 8 bits (symmetric q4; H = 2^(b - 1)): with m = max w if max w >= -min w, else min w,
        scale = m / -(H + 0.25); at most |m| = (H + 0.5) |scale|;
        code = H + clamp(rint(w / scale), -H, H - 1).
    zeros (T = 2^b - 1): with h = max(max w, 0) and l = min(min w, 0),
        scale = (h - l) / (T + 0.5); at most h - l = (T + 1) scale;
        zero = clamp(rint((T - (h + l) / scale) * 0.5), 0, T); code = clamp(rint(w / scale) + zero, 0, T).
    minimum: with h = max w and l = min w (of K-quants min(min w, 0)),
        scale = (h - l) / T; minimum = -l; code = clamp(rint((w + minimum) / scale), 0, T).

    Where a scale that was rounded to float16 is too small for what is "at most" allowed, which happens below
    6e-5 where float16 loses digits, it is the next float16 number away from 0. The scale of a group of zeros
    is 0 (of either sign), and its codes are those of 0. Scales of K-quants are multiples of a float16 number:
    the largest one of a super-block divided by the largest multiplier there is, and rounded in the same way.

    Args:
        w: float32, float16 or bfloat16 [N, K].
        scheme: any but e4m3.
        search: choose the scale (and zero point or minimum) of each group so that the squared error is small;
            where no better one is found, the one by rule stays.
        importance: how much the squared error of each column counts in a search, [K], at least 0.

    Raises:
        DTypeError: `w` is not of a floating-point type.
        ShapeError: `w` is not a matrix, or groups do not divide its rows.
        CheckpointError: `w` holds NaN or infinity.
        UnsupportedError: a weight is too large for a float16 scale, or the scheme is e4m3.
    """
    _check(w, scheme, importance)
    rows, columns = w.shape
    whole = _empty(scheme, rows, columns)
    weights = None if importance is None else importance.reshape(1, -1, scheme.group_size).astype(np.float32)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        rounded = _round(np.ascontiguousarray(w[part], np.float32), scheme, weights, search=search)
        write_codes(rounded.codes.data, whole.codes.layout, whole.codes.data[part])
        for target, source in zip(_of_groups(whole), _of_groups(rounded), strict=True):
            target[part] = source
    return whole


def _check(w: NDArray[Any], scheme: Scheme, importance: NDArray[np.float32] | None) -> None:
    if not DType.of(w.dtype).is_float:
        raise DTypeError(f"only floating-point weights can be quantized to {scheme.name}, not {w.dtype}")
    if w.ndim != 2 or 0 in w.shape:
        raise ShapeError(f"only a matrix that is not empty can be quantized, not shape {w.shape}")
    if scheme.coding == "e4m3":
        raise UnsupportedError("weights cannot be rounded to e4m3; q8 takes as much memory")
    scheme.check_columns(w.shape[1])
    if importance is not None and importance.shape != w.shape[1:]:
        raise ShapeError(f"the importance of {w.shape[1]} columns has the shape {importance.shape}")


def _layout(scheme: Scheme, columns: int) -> CodeLayout:
    """int8 for q8, else codes without gaps, or bytes where such do not divide the rows."""
    if scheme.bits == 8 and scheme.coding == "middle":
        return INT8
    layout = dense_layout(scheme.bits)
    return BYTES if columns % layout.block_size else layout


def _empty(scheme: Scheme, rows: int, columns: int) -> QuantTensor:
    """A tensor to be filled."""

    def make(per_column: int, dtype: np.dtype[Any], wanted: bool) -> NDArray[Any] | None:
        return np.empty((rows, columns // per_column), dtype) if wanted else None

    scale, half = scheme.scale.numpy, np.dtype(np.float16)
    zero = np.dtype(np.uint8) if scheme.coding == "zeros" else scale
    scales = make(scheme.group_size, scale, True)
    assert scales is not None
    layout = _layout(scheme, columns)
    return QuantTensor(
        scheme,
        Codes(np.empty((rows, layout.row_bytes(columns)), np.uint8), layout, columns),
        scales,
        make(scheme.group_size, zero, scheme.has_zeros),
        make(SUPER_BLOCK, half, scheme.has_super_blocks),
        make(SUPER_BLOCK, half, scheme.has_super_blocks and scheme.has_zeros),
    )


def _of_groups(weight: QuantTensor) -> tuple[NDArray[Any], ...]:
    """What a tensor has beside its codes."""
    parts = weight.scales, weight.zeros, weight.super_scales, weight.super_zeros
    return tuple(part for part in parts if part is not None)


def _round(rows: Floats, scheme: Scheme, weights: Floats | None, *, search: bool) -> QuantTensor:
    """Rows [n, K] to codes of a byte each."""
    groups = rows.reshape(len(rows), -1, scheme.group_size)
    extent = Extent.of(groups)
    if not (np.isfinite(extent.high).all() and np.isfinite(extent.low).all()):
        raise CheckpointError(
            "a weight is NaN or infinite; the checkpoint is damaged and cannot be quantized"
        )
    with np.errstate(over="ignore"):  # refused below
        fit = by_rule(extent, scheme)
    _refuse_too_large(fit, extent, scheme)
    rounded = _encode(groups, _store(fit, extent, scheme))
    if not search:
        return rounded
    with np.errstate(all="ignore"):  # numbers near the ends of a type's range make no better candidates
        found = _encode(groups, _store(searched(groups, extent, scheme, weights), extent, scheme))
        _take_better(rounded, found, groups, weights)
        if scheme.has_super_blocks:
            found = _encode(groups, replace(rounded, **refit(rows, weights, rounded)._asdict()))
            _take_better(rounded, found, groups, weights)
    return rounded


def _refuse_too_large(fit: Fit, extent: Extent, scheme: Scheme) -> None:
    largest = max(np.abs(part).max() for part in fit[:2] if part is not None)
    if scheme.scale is not DType.float32 and largest > _HALF_MAX:
        weight = float(extent.magnitude.max())
        raise UnsupportedError(
            f"a weight of {weight:.3g} is too large for {scheme.name}, whose float16 scale allows "
            f"{weight * (_HALF_MAX / float(largest)):.3g}; run without quantization"
        )


def _store(fit: Fit, extent: Extent, scheme: Scheme) -> QuantTensor:
    """What stands for groups, in the types of the scheme, with codes that are yet to be written."""
    rows, count = fit.scales.shape
    codes = Codes.of_bytes(np.empty((rows, count * scheme.group_size), np.uint8))
    if scheme.has_super_blocks:
        return QuantTensor(scheme, codes, *split(fit, scheme))
    scales: NDArray[Any] = fit.scales
    if scheme.scale is DType.float16:
        scales = to_half(scales, fit.reach, scales_in_reach(scheme))
    if scheme.coding == "middle":
        return QuantTensor(scheme, codes, scales)
    if scheme.coding == "minimum":
        assert fit.zeros is not None
        return QuantTensor(scheme, codes, scales, fit.zeros.astype(scales.dtype))
    zeros = zero_points(extent, scales.astype(np.float32), scheme) if fit.zeros is None else fit.zeros
    return QuantTensor(scheme, codes, scales, zeros.astype(np.uint8))


def _encode(groups: Floats, rounded: QuantTensor) -> QuantTensor:
    """Write the codes nearest to groups [rows, groups, group_size]."""
    scheme = rounded.scheme
    scales, minimums = nonzero(rounded.group_scales())[:, :, None], rounded.group_minimums()
    codes = (groups if minimums is None else groups + minimums[:, :, None]) / scales
    np.rint(codes, out=codes)
    if scheme.coding == "zeros":
        assert rounded.zeros is not None
        codes += rounded.zeros[:, :, None]
    elif scheme.coding == "middle":
        codes += np.float32(scheme.middle)
    # Of 8 bits the least code is left out, so that the range is symmetric.
    least = 1 if scheme.coding == "middle" and scheme.bits == 8 else 0
    np.clip(codes, least, (1 << scheme.bits) - 1, out=codes)
    rounded.codes.data[:] = codes.reshape(rounded.shape)
    return rounded


def _take_better(rounded: QuantTensor, other: QuantTensor, groups: Floats, weights: Floats | None) -> None:
    """Replace what has less squared error in `other`: groups, or whole super-blocks."""
    unit = SUPER_BLOCK if rounded.scheme.has_super_blocks else rounded.scheme.group_size

    def error(candidate: QuantTensor) -> Floats:
        difference = candidate.dequantize().reshape(groups.shape) - groups
        difference *= difference if weights is None else difference * weights
        errors: Floats = difference.reshape(len(groups), -1, unit).sum(axis=2)
        return errors

    better = error(other) < error(rounded)
    pairs = zip(_of_groups(rounded), _of_groups(other), strict=True)
    for target, source in ((rounded.codes.data, other.codes.data), *pairs):
        shape = (*better.shape, -1)
        np.copyto(target.reshape(shape), source.reshape(shape), where=better[:, :, None])
