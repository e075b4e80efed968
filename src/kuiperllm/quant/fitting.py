"""Scales for groups of weights: by rule from the largest weights, or searched for the least squared error.

Arrays are float32 in groups, [rows, groups, group_size]. What squared errors are weighted with is
[1, groups, group_size], or None where every weight counts the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kuiperllm.quant.scheme import Scheme

Floats = NDArray[np.float32]

Q8_MAX = 127
# The largest weight of a group gets the code at the end of the range, though it is so many scales beyond it:
# a slightly smaller scale serves the many other weights better. The squared error of normal weights in
# groups of 64 is 0.00875 of their square, without it 0.00902; with zero points 0.00796 instead of 0.00829.
_BEYOND_MIDDLE = np.float32(0.25)
_BEYOND_ENDS = np.float32(0.5)
# What else a search tries.
_TRIALS_MIDDLE = (-0.7, -0.4, -0.1, 0.25, 0.5, 0.8, 1.2, 1.6, 2.0, 2.5, 3.0)
_TRIALS_ENDS = (-0.6, 0.0, 0.5, 1.0, 1.5, 2.1, 2.8, 3.5, 4.3)


class Extent(NamedTuple):
    """The largest and the smallest weight of each group, [rows, groups]."""

    high: Floats
    low: Floats

    @classmethod
    def of(cls, groups: Floats) -> Extent:
        """Of groups [rows, groups, group_size]."""
        # NumPy takes the largest of many short rows four times as fast when they stand in columns.
        columns = np.ascontiguousarray(groups.reshape(-1, groups.shape[2]).T)
        shape = groups.shape[:2]
        return cls(columns.max(axis=0).reshape(shape), columns.min(axis=0).reshape(shape))

    @property
    def magnitude(self) -> Floats:
        """Of the weight that is farthest from 0."""
        return np.maximum(self.high, -self.low)

    @property
    def farthest(self) -> Floats:
        """The weight that is farthest from 0, with its sign; the positive one of two."""
        return np.where(self.high >= -self.low, self.high, self.low)

    @property
    def with_zero(self) -> Extent:
        """The range that also holds 0."""
        return Extent(np.maximum(self.high, 0), np.minimum(self.low, 0))

    def of_codes(self, scheme: Scheme) -> Extent:
        """The range that codes with an end of their own are spread over."""
        if scheme.coding == "zeros":
            return self.with_zero
        return Extent(self.high, np.minimum(self.low, 0)) if scheme.has_super_blocks else self


class Fit(NamedTuple):
    """What stands for groups, [rows, groups], before it is rounded to the type it is stored in."""

    scales: Floats
    zeros: Floats | None = None
    """Zero points (None: those of `zero_points`), or minimums."""
    reach: Floats | None = None
    """What `scales_in_reach` scales must reach; None in a search, which compares errors instead."""


def by_rule(extent: Extent, scheme: Scheme) -> Fit:
    """Scales as `rounding.quantize` documents them."""
    if scheme.coding == "middle" and scheme.bits == 8:
        return Fit(extent.magnitude / np.float32(Q8_MAX), None, extent.magnitude)
    if scheme.coding == "middle":
        farthest = extent.farthest
        return Fit(farthest / -(np.float32(scheme.middle) + _BEYOND_MIDDLE), None, np.abs(farthest))
    high, low = extent.of_codes(scheme)
    top = np.float32((1 << scheme.bits) - 1)
    if scheme.coding == "zeros":
        return Fit((high - low) / (top + _BEYOND_ENDS), None, high - low)
    return Fit((high - low) / top, -low, high - low)


def scales_in_reach(scheme: Scheme) -> np.float32:
    """How many scales the weights of a group may extend over before the farthest are cut off too much."""
    if scheme.coding == "middle":
        return np.float32((Q8_MAX if scheme.bits == 8 else scheme.middle) + 0.5)
    return np.float32((1 << scheme.bits) - (0 if scheme.coding == "zeros" else 0.5))


def to_half(scales: Floats, reach: Floats | None, limit: np.float32) -> NDArray[np.float16]:
    """Scales in float16; one step farther from 0 where `limit` of them would not make `reach`."""
    halves: NDArray[np.float16] = scales.astype(np.float16)
    if reach is not None:
        too_small = np.abs(halves).astype(np.float32) * limit < reach
        away = np.copysign(np.float16(np.inf), scales[too_small]).astype(np.float16)
        halves[too_small] = np.nextafter(halves[too_small], away)
    return halves


def zero_points(extent: Extent, scales: Floats, scheme: Scheme) -> Floats:
    """Whole numbers that put the range of codes around the weights of each group."""
    high, low = extent.with_zero
    top = np.float32((1 << scheme.bits) - 1)
    zeros: Floats = np.rint((top - (high + low) / nonzero(scales)) * np.float32(0.5))
    return np.clip(zeros, 0, top, out=zeros)


def nonzero(scales: Floats) -> Floats:
    """Scales to divide by: 1 for a group of zeros."""
    return np.where(scales == 0, np.float32(1), scales)


def searched(groups: Floats, extent: Extent, scheme: Scheme, weights: Floats | None) -> Fit:
    """Scales (and zero points or minimums) that leave a small squared error.

    Several scales are tried. For the codes that each leads to, the best scale is known in closed form (least
    squares), and so is the error that it leaves.
    """
    sums = _Sums(groups, weights)
    if scheme.coding == "minimum":
        return _search_minimum(sums, extent.of_codes(scheme), scheme)
    if scheme.coding == "zeros":
        return _search_zeros(sums, extent, scheme)
    return _search_middle(sums, extent, scheme)


class _Sums:
    """Sums over the weights of each group, weighted where that is asked for."""

    def __init__(self, groups: Floats, weights: Floats | None) -> None:
        self.groups = groups
        self.weights = weights
        self.weighted = groups if weights is None else groups * weights

    def rounded(self, scales: Floats, low: Floats | np.float32, high: Floats | np.float32) -> Floats:
        """The groups in scales, as whole numbers from `low` to `high`."""
        codes: Floats = self.groups / nonzero(scales)[:, :, None]
        np.rint(codes, out=codes)
        np.clip(codes, low, high, out=codes)
        return codes

    def of_products(self, codes: Floats) -> Floats:
        """Of code times weight of the matrix."""
        return _inner(codes, self.weighted)

    def of_squares(self, codes: Floats) -> Floats:
        """Of squared codes."""
        return _inner(codes, codes if self.weights is None else codes * self.weights)

    def of_codes(self, codes: Floats) -> Floats:
        """Of codes."""
        return _total(codes if self.weights is None else codes * self.weights)

    @property
    def count(self) -> Floats:
        """Of ones."""
        if self.weights is None:
            return np.full((1, 1), self.groups.shape[2], np.float32)
        return _total(self.weights)


def _inner(codes: Floats, others: Floats) -> Floats:
    """Sums of products over each group."""
    products: Floats = np.einsum("rgi,rgi->rg", codes, others)
    return products


def _total(numbers: Floats) -> Floats:
    """Sums over each group."""
    totals: Floats = numbers.sum(axis=2)
    return totals


def _search_middle(sums: _Sums, extent: Extent, scheme: Scheme) -> Fit:
    if scheme.bits == 8:
        end, low, high = extent.magnitude, -Q8_MAX, Q8_MAX
    else:
        end, low, high = -extent.farthest, -scheme.middle, scheme.middle - 1

    def codes_of(scales: Floats) -> tuple[Floats, Floats]:
        return sums.rounded(scales, np.float32(low), np.float32(high)), scales

    return Fit(
        _best_scales(sums, [end / np.float32(trial - low) for trial in _TRIALS_MIDDLE], codes_of).scales
    )


def _search_zeros(sums: _Sums, extent: Extent, scheme: Scheme) -> Fit:
    top = np.float32((1 << scheme.bits) - 1)
    high, low = extent.with_zero

    def codes_of(scales: Floats) -> tuple[Floats, Floats]:
        zeros = zero_points(extent, scales, scheme)
        return sums.rounded(scales, -zeros[:, :, None], (top - zeros)[:, :, None]), zeros

    trials = [(high - low) / (top + np.float32(trial)) for trial in _TRIALS_ENDS]
    return _best_scales(sums, trials, codes_of)


def _best_scales(
    sums: _Sums, trials: list[Floats], codes_of: Callable[[Floats], tuple[Floats, Floats]]
) -> Fit:
    """Least squares for one number of each group: its weights are about scale times signed code.

    `codes_of` gives the codes that a scale leads to, and what belongs to them.
    """
    scales, zeros, gained = (np.zeros_like(trials[0]) for _ in range(3))
    for trial in trials:
        codes, of_trial = codes_of(trial)
        product, square = sums.of_products(codes), sums.of_squares(codes)
        fitted = product / nonzero(square)
        gain = product * fitted  # how much less the squared error is than that of zeros
        better = gain > gained
        scales, zeros = np.where(better, fitted, scales), np.where(better, of_trial, zeros)
        gained = np.where(better, gain, gained)
    return Fit(scales, zeros)


def _search_minimum(sums: _Sums, extent: Extent, scheme: Scheme) -> Fit:
    """Least squares for two numbers of each group: its weights are about scale times code less minimum."""
    top, reach = np.float32((1 << scheme.bits) - 1), extent.high - extent.low
    scales, minimums, least = np.zeros_like(reach), -extent.low, np.full_like(reach, np.inf)
    for trial in _TRIALS_ENDS:
        scale = nonzero(reach / (top + np.float32(trial)))
        start = extent.low + np.float32(trial / 2) * scale  # as much is cut off at one end as at the other
        codes = (sums.groups - start[:, :, None]) / scale[:, :, None]
        np.rint(codes, out=codes)
        np.clip(codes, 0, top, out=codes)
        fitted, minimum, error = _least_squares(sums, codes, bounded=scheme.has_super_blocks)
        better = error < least
        scales, minimums = np.where(better, fitted, scales), np.where(better, minimum, minimums)
        least = np.where(better, error, least)
    return Fit(scales, minimums)


def _least_squares(sums: _Sums, codes: Floats, *, bounded: bool) -> tuple[Floats, Floats, Floats]:
    """Scale, minimum and (but for a constant) squared error; minimums are at least 0 if `bounded`."""
    count, total = sums.count, _total(sums.weighted)
    codes_total, square, product = sums.of_codes(codes), sums.of_squares(codes), sums.of_products(codes)
    determinant = count * square - codes_total * codes_total
    determinant[determinant <= 0] = np.inf
    scale: Floats = np.divide(count * product - total * codes_total, determinant)
    minimum: Floats = np.divide(scale * codes_total - total, nonzero(count))
    if bounded:
        below = minimum < 0
        scale[below] = (product / nonzero(square))[below]
        minimum[below] = 0
    error: Floats = (
        scale * (scale * square - 2 * product - 2 * minimum * codes_total)
        + minimum * (2 * total + minimum * count)
    )  # fmt: skip
    return scale, minimum, error
