"""4-bit codes that are numbers of a table instead of equal steps."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def normal_table(count: int = 16) -> Floats:
    """The middles of equally likely slices of a normal distribution, divided by the largest: -1 to 1."""
    slices = [(i + 0.5) / count for i in range(count)]
    table = np.array([NormalDist().inv_cdf(p) for p in slices], np.float32)
    return table / table.max()


def quantize_by_table(
    w: Floats, table: Floats, group_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Codes [N, K] and float16 scales [N, K / group_size]; a weight is about scale * table[code].

    The scale of a group is its largest magnitude, rounded to float16 before anything is divided by it.
    """
    groups = w.reshape(len(w), -1, group_size)
    scales = np.abs(groups).max(axis=2).astype(np.float16)
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    # Where a sorted table's nearest number changes: at the means of neighbours.
    borders = (table[1:] + table[:-1]) / 2
    codes = np.searchsorted(borders, groups / divisors[:, :, None]).astype(np.uint8)
    return codes.reshape(w.shape), scales


def dequantize_by_table(codes: NDArray[np.uint8], scales: NDArray[np.float16], table: Floats) -> Floats:
    """The weights that codes stand for, float32 [N, K]."""
    groups = table[codes].reshape(*scales.shape, -1)
    return (groups * scales.astype(np.float32)[:, :, None]).reshape(codes.shape)
