"""Random quantized matrices of any scheme, for tests and for timing kernels without a checkpoint."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from kuiperllm.quant.codes import CodeLayout, Codes, dense_layout
from kuiperllm.quant.scheme import SUPER_BLOCK, Scheme
from kuiperllm.quant.tensor import QuantTensor

_PERIOD = 1 << 20  # bytes of codes that a cheap tensor is made of
_E4M3_SIZE = 112.0  # standard deviation of e4m3 numbers: 4 of them make 448, the largest there is


def random_tensor(
    rng: np.random.Generator,
    scheme: Scheme,
    rows: int,
    columns: int,
    *,
    layout: CodeLayout | None = None,
    shuffled: bool = False,
    cheap: bool = False,
) -> QuantTensor:
    """A matrix [rows, columns] whose weights have about the standard deviation 1 / sqrt(columns).

    Every code that the scheme has occurs (of e4m3: numbers spread as normal ones), and scales of both signs
    where the coding is `middle`, as files have them.

    Args:
        rng: where the numbers come from.
        scheme: how the matrix is quantized.
        rows: N.
        columns: K, which the scheme's groups divide.
        layout: where codes lie, without gaps; planes of `dense_layout` if None.
        shuffled: store the columns in a random order.
        cheap: rows of codes are overlapping pieces of a million bytes, and scales repeat, so that a matrix of
            any size takes next to no time.

    Raises:
        ShapeError: groups do not divide the columns.
    """
    scheme.check_columns(columns)
    layout = layout or dense_layout(scheme.bits)
    data = _bytes(rng, rows, layout.row_bytes(columns), cheap=cheap)
    size, mean = _spread_of_codes(scheme)
    if scheme.coding == "e4m3":
        data = _normal_e4m3()[data]
    shape, of_code = (rows, columns // scheme.group_size), 1 / (columns**0.5 * size)
    super_shape = (rows, columns // SUPER_BLOCK)
    scales, super_scales = _scales(rng, scheme, shape, super_shape, of_code, cheap=cheap)
    zeros, super_zeros = _zeros(rng, scheme, scales, super_scales, mean)
    return QuantTensor(
        scheme,
        Codes(data, layout, columns),
        scales,
        zeros,
        super_scales,
        super_zeros,
        rng.permutation(columns).astype(np.int32) if shuffled else None,
    )


def _bytes(rng: np.random.Generator, rows: int, row_bytes: int, *, cheap: bool) -> NDArray[np.uint8]:
    if not cheap or rows * row_bytes <= _PERIOD:
        return rng.integers(0, 256, (rows, row_bytes), np.uint8)
    period = max(_PERIOD, 2 * row_bytes)
    step = max(1, (period - row_bytes) // rows)
    numbers = rng.integers(0, 256, rows * step + row_bytes, np.uint8)
    return as_strided(numbers, (rows, row_bytes), (step, 1))


def _spread_of_codes(scheme: Scheme) -> tuple[float, float]:
    """Standard deviation and mean of the codes."""
    if scheme.coding == "e4m3":
        return _E4M3_SIZE, 0.0
    count = 1 << scheme.bits
    return ((count * count - 1) / 12) ** 0.5, (count - 1) / 2


@lru_cache(maxsize=1)
def _normal_e4m3() -> NDArray[np.uint8]:
    """256 codes whose numbers are spread as normal ones."""
    rng = np.random.default_rng(0)
    numbers = np.clip(rng.standard_normal(256) * _E4M3_SIZE, -448, 448)
    return numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _scales(
    rng: np.random.Generator,
    scheme: Scheme,
    shape: tuple[int, int],
    super_shape: tuple[int, int],
    of_code: float,
    *,
    cheap: bool,
) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
    """Scales of about `of_code`, and the scales of scales."""

    def near_one(shape: tuple[int, int]) -> NDArray[np.float64]:
        count = shape[0] * shape[1]
        numbers = rng.uniform(0.5, 1.4, min(count, _PERIOD // 16 + 1) if cheap else count)
        return np.resize(numbers, shape)

    sizes = near_one(shape)
    if scheme.coding == "middle":
        sizes *= np.where(np.resize(rng.random(997), shape) < 0.5, -1, 1)
    if not scheme.has_super_blocks:
        return (sizes * of_code).astype(scheme.scale.numpy), None
    multiplier = scheme.multipliers[1] // 1.5  # in the middle of what there is
    of_multiplier = near_one(super_shape) * (of_code / multiplier)
    return np.rint(sizes * multiplier).astype(np.int8), of_multiplier.astype(np.float16)


def _zeros(
    rng: np.random.Generator,
    scheme: Scheme,
    scales: NDArray[Any],
    super_scales: NDArray[np.float16] | None,
    mean: float,
) -> tuple[NDArray[Any] | None, NDArray[np.float16] | None]:
    """Zero points or minimums that make the mean weight of a group about 0, and the scales of minimums."""
    if scheme.coding == "zeros":
        spread = max(1, 1 << scheme.bits >> 2)
        around = np.resize(rng.integers(-spread, spread + 1, 4093), scales.shape)
        return (around + round(mean)).astype(np.uint8), None
    if scheme.coding != "minimum":
        return None, None
    share = np.resize(rng.uniform(0.8, 1.2, 4093), scales.shape)
    if super_scales is None:
        return (scales.astype(np.float64) * mean * share).astype(scheme.scale.numpy), None
    super_zeros = (super_scales.astype(np.float64) * mean).astype(np.float16)
    return np.clip(np.rint(scales * share), 0, scheme.multipliers[1]).astype(np.int8), super_zeros
