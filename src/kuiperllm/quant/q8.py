"""Symmetric int8 groups along the input dimension: w ≈ scale · q, q in -127 … 127."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.dtype import DType
from kuiperllm.errors import DTypeError, ShapeError
from kuiperllm.quant.codes import Codes
from kuiperllm.quant.rounding import quantize
from kuiperllm.quant.scheme import q8
from kuiperllm.quant.tensor import QuantTensor


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
    """Round a matrix [N, K] to int8 groups with float16 scales, by the rule of `rounding.quantize`.

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
    if group_size < 1 or (w.ndim == 2 and w.shape[1] % group_size):
        raise ShapeError(
            f"int8 groups of {group_size} do not divide rows of {w.shape[-1]} weights; choose a divisor"
        )
    return quantize(w, q8(group_size))
