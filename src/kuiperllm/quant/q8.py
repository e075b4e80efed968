"""Rounding to symmetric int8 groups along the input dimension: w ≈ scale · q, q in -127 … 127."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from kuiperllm.quant.codes import Codes
from kuiperllm.quant.scheme import q8
from kuiperllm.quant.tensor import QuantTensor

Q_MAX = 127
_SCALE_MAX = float(np.finfo(np.float16).max)
# Elements that are quantized at a time: the float32 working copy (256 KiB) stays in the second-level cache
# and an embedding of a gigabyte needs no gigabytes beside it.
_CHUNK = 1 << 16


def int8_tensor(values: NDArray[np.int8], scales: NDArray[Any]) -> QuantTensor:
    """int8 values [N, K] with scales, float16 or float32 [N, K / group_size].

    Raises:
        ShapeError: they do not fit together.
        DTypeError: they have other types.
    """
    if values.dtype != np.int8:
        raise DTypeError(f"int8 groups: values must be int8, not {values.dtype}")
    if scales.dtype not in (np.float16, np.float32):
        raise DTypeError(f"int8 groups: scales must be float16 or float32, not {scales.dtype}")
    if values.ndim != 2 or scales.ndim != 2 or 0 in values.shape or 0 in scales.shape:
        raise ShapeError(
            f"int8 groups: values and scales must be two-dimensional and not empty, "
            f"not {values.shape} and {scales.shape}"
        )
    columns, groups = values.shape[1], scales.shape[1]
    if len(values) != len(scales) or columns % groups:
        raise ShapeError(
            f"int8 groups: scales of shape {scales.shape} do not divide values of shape {values.shape}"
        )
    return QuantTensor(q8(columns // groups, DType.of(scales.dtype)), Codes.of_int8(values), scales)


def quantize_q8(w: NDArray[Any], group_size: int) -> QuantTensor:
    """Round a matrix [N, K] to int8 groups with float16 scales.

    The scale of a group is max|w| / 127 rounded to float16, and the values are rounded to nearest against
    that stored scale, so that every weight comes back within half a scale. Where float16 is too coarse for
    that (below 6e-5 it loses digits) the scale is rounded up, so that the largest weight stays within 127.

    Args:
        w: float32, float16 or bfloat16 [N, K].
        group_size: weights that share a scale; divides K.

    Raises:
        DTypeError: `w` is not of a floating-point type.
        ShapeError: `w` is not a matrix, or K is not a multiple of `group_size`.
        CheckpointError: `w` holds NaN or infinity.
        UnsupportedError: a weight is too large for a float16 scale.
    """
    if not DType.of(w.dtype).is_float:
        raise DTypeError(f"only floating-point weights can be quantized to int8 groups, not {w.dtype}")
    if w.ndim != 2 or 0 in w.shape:
        raise ShapeError(
            f"only a matrix that is not empty can be quantized to int8 groups, not shape {w.shape}"
        )
    rows, columns = w.shape
    if group_size < 1 or columns % group_size:
        raise ShapeError(
            f"int8 groups of {group_size} do not divide rows of {columns} weights; choose a divisor"
        )
    values = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // group_size), np.float16)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = w[part].astype(np.float32).reshape(-1, group_size)
        scale = _group_scales(groups)
        groups /= np.where(scale == 0, np.float32(1), scale.astype(np.float32))[:, None]
        np.rint(groups, out=groups)
        values[part] = groups.reshape(-1, columns)
        scales[part] = scale.reshape(-1, scales.shape[1])
    return int8_tensor(values, scales)


def _group_scales(groups: NDArray[np.float32]) -> NDArray[np.float16]:
    """The float16 scale of each row of `groups`; 0 for a row of zeros."""
    largest = np.maximum(groups.max(axis=1), -groups.min(axis=1))
    if not np.isfinite(largest).all():
        raise CheckpointError(
            "a weight is NaN or infinite; the checkpoint is damaged and cannot be quantized"
        )
    if largest.max() > Q_MAX * _SCALE_MAX:
        raise UnsupportedError(
            f"a weight of {largest.max():.3g} is too large for int8 groups, whose float16 scale allows "
            f"{Q_MAX * _SCALE_MAX:.3g}; run without quantization"
        )
    scale: NDArray[np.float16] = (largest / np.float32(Q_MAX)).astype(np.float16)
    too_small = scale.astype(np.float32) * np.float32(Q_MAX + 0.5) < largest
    scale[too_small] = np.nextafter(scale[too_small], np.float16(np.inf))
    return scale
