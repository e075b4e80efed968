"""Scales of groups as whole multiples of a float16 number that a super-block shares (GGUF's K-quants)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kuiperllm.quant.fitting import Fit, Floats, nonzero, to_half
from kuiperllm.quant.scheme import SUPER_BLOCK, Scheme
from kuiperllm.quant.tensor import QuantTensor


class SuperScales(NamedTuple):
    """The fields of a `QuantTensor` after its codes."""

    scales: NDArray[np.int8]
    zeros: NDArray[np.int8] | None
    super_scales: NDArray[np.float16]
    super_zeros: NDArray[np.float16] | None


def split(fit: Fit, scheme: Scheme) -> SuperScales:
    """The scales and minimums of a fit, [rows, groups]: multipliers, and what they multiply."""
    per_block, (least, most) = SUPER_BLOCK // scheme.group_size, scheme.multipliers
    scales, super_scales = _multiples(fit.scales, per_block, least, most)
    if fit.zeros is None:
        return SuperScales(scales, None, super_scales, None)
    zeros, super_zeros = _multiples(fit.zeros, per_block, 0, most)
    return SuperScales(scales, zeros, super_scales, super_zeros)


def _multiples(
    numbers: Floats, per_block: int, least: int, most: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """The number farthest from 0 gets the multiplier that is farthest from 0."""
    blocks = numbers.reshape(len(numbers), -1, per_block)
    high, low = blocks.max(axis=2), blocks.min(axis=2)
    farthest, end = np.where(high >= -low, high, low), np.float32(least or most)
    supers = to_half(farthest / end, np.abs(farthest), np.abs(end) + np.float32(0.5))
    multipliers = np.rint(blocks / nonzero(supers.astype(np.float32))[:, :, None])
    multipliers = np.clip(multipliers, least, most).astype(np.int8)
    return multipliers.reshape(numbers.shape), supers


def refit(rows: Floats, weights: Floats | None, rounded: QuantTensor) -> SuperScales:
    """Other super-scales that leave the least squared error for the codes and multipliers that there are.

    Args:
        rows: the matrix, [rows, K].
        weights: of squared errors, [1, groups, group_size].
        rounded: what it was rounded to, codes in bytes.
    """
    shape = len(rows), -1, SUPER_BLOCK
    per_group = rounded.scheme.group_size
    x = rows.reshape(shape)
    h = np.ones_like(x[:1]) if weights is None else weights.reshape(1, -1, SUPER_BLOCK)
    codes = rounded.codes.data.astype(np.float32)
    if rounded.scheme.coding == "middle":
        codes -= np.float32(rounded.scheme.middle)
    a = (codes * np.repeat(rounded.scales.astype(np.float32), per_group, axis=1)).reshape(shape)
    aa, ax = (h * a * a).sum(axis=2), (h * a * x).sum(axis=2)
    if rounded.zeros is None:
        return SuperScales(rounded.scales, None, _half(ax / nonzero(aa)), None)
    b = np.repeat(rounded.zeros.astype(np.float32), per_group, axis=1).reshape(shape)
    bb, bx, ab = (h * b * b).sum(axis=2), (h * b * x).sum(axis=2), (h * a * b).sum(axis=2)
    # The normal equations of x = d a - m b.
    determinant = aa * bb - ab * ab
    determinant[determinant <= 0] = np.inf
    d, m = (ax * bb - bx * ab) / determinant, (ax * ab - bx * aa) / determinant
    return SuperScales(rounded.scales, rounded.zeros, _half(d), _half(m))


def _half(numbers: Floats) -> NDArray[np.float16]:
    return to_half(numbers, None, np.float32(1))
