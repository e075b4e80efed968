"""A quantized matrix on the host, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kuiperllm.errors import DTypeError, ShapeError
from kuiperllm.quant.codes import Codes
from kuiperllm.quant.scheme import SUPER_BLOCK, Scheme

_CHUNK = 1 << 18  # weights that are dequantized at a time: temporaries stay in the second-level cache


@dataclass(frozen=True, slots=True, eq=False)
class QuantTensor:
    """A matrix [N, K] of codes, with a scale for each group of columns.

    Raises:
        ShapeError: the parts do not fit together.
        DTypeError: a part has another type than the scheme states.
    """

    scheme: Scheme
    codes: Codes
    """[N, K]"""
    scales: NDArray[Any]
    """[N, K / group_size], of the scheme's type."""
    zeros: NDArray[Any] | None = None
    """[N, K / group_size]: zero points, uint8; or minimums, of the scale's type."""
    super_scales: NDArray[np.float16] | None = None
    """float16 [N, K / 256], if scales are int8."""
    super_zeros: NDArray[np.float16] | None = None
    """float16 [N, K / 256], if minimums are int8."""
    columns: NDArray[np.int32] | None = None
    """Where the columns are stored in another order (GPTQ's act-order), [K]: column j of the codes is column
    `columns[j]` of the matrix. None: as they are."""

    def __post_init__(self) -> None:
        scheme, (rows, columns) = self.scheme, self.shape
        if self.codes.layout.bits > 8 or (self.codes.layout.bits < scheme.bits):
            raise ShapeError(f"{scheme.name}: codes of {self.codes.layout.bits} bits")
        scheme.check_columns(columns)
        groups, super_blocks = (rows, columns // scheme.group_size), (rows, columns // SUPER_BLOCK)
        scale = scheme.scale.numpy
        zero = np.dtype(np.uint8) if scheme.coding == "zeros" else scale
        _check(scheme, "scales", self.scales, groups, scale)
        _check(scheme, "zeros", self.zeros, groups if scheme.has_zeros else None, zero)
        super_shape = super_blocks if scheme.has_super_blocks else None
        half = np.dtype(np.float16)
        _check(scheme, "super_scales", self.super_scales, super_shape, half)
        _check(scheme, "super_zeros", self.super_zeros, super_shape if scheme.has_zeros else None, half)
        if self.columns is not None and (
            self.columns.shape != (columns,) or self.columns.dtype != np.dtype(np.int32)
        ):
            raise ShapeError(f"{scheme.name}: an order of {self.columns.shape} columns, not of {columns}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as of the matrix that this stands for."""
        return self.codes.data.shape[0], self.codes.columns

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.scheme.group_size

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Everything it is made of."""
        parts = self.scales, self.zeros, self.super_scales, self.super_zeros, self.columns
        return self.codes.data, *(part for part in parts if part is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together, without gaps between codes."""
        of_codes = self.shape[0] * self.shape[1] * self.codes.layout.bits // 8
        return of_codes + sum(part.nbytes for part in self.arrays[1:])

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> QuantTensor:
        """Some rows: views for a slice, copies for a list of indices."""

        def of(part: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if part is None else part[rows]

        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zeros=of(self.zeros),
            super_scales=of(self.super_scales),
            super_zeros=of(self.super_zeros),
        )

    @property
    def has_finite_scales(self) -> bool:
        """Whether no scale and no minimum, of groups or of super-blocks, is NaN or infinite."""
        parts = self.scales, self.zeros, self.super_scales, self.super_zeros
        return all(_is_finite(part) for part in parts if part is not None)

    def group_scales(self) -> NDArray[np.float32]:
        """The scale of each group, float32 [N, K / group_size]: exact, whatever the scheme."""
        return _of_groups(self.scales, self.super_scales)

    def group_minimums(self) -> NDArray[np.float32] | None:
        """The minimum of each group, float32 [N, K / group_size]; None where the coding has none."""
        if self.scheme.coding != "minimum":
            return None
        assert self.zeros is not None
        return _of_groups(self.zeros, self.super_zeros)

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix in float32, [N, K], computed in float32 as `Scheme.coding` says."""
        (rows, columns), matrix = self.shape, np.empty(self.shape, np.float32)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            self[start : start + step]._dequantize_into(matrix[start : start + step])
        return matrix

    def _dequantize_into(self, matrix: NDArray[np.float32]) -> None:
        scheme, codes = self.scheme, self.codes.unpack()
        values = np.empty(self.shape, np.float32)
        groups = values.reshape(*self.scales.shape, scheme.group_size)
        if scheme.coding == "e4m3":
            values[:] = codes.view(ml_dtypes.float8_e4m3fn)
        else:
            values[:] = codes
        if scheme.coding == "middle":
            groups -= np.float32(scheme.middle)
        elif scheme.coding == "zeros":
            assert self.zeros is not None
            groups -= self.zeros.astype(np.float32)[:, :, None]
        groups *= self.group_scales()[:, :, None]
        if (minimums := self.group_minimums()) is not None:
            groups -= minimums[:, :, None]
        if self.columns is None:
            matrix[:] = values
        else:
            matrix[:, self.columns] = values


def concatenate(parts: Sequence[QuantTensor]) -> QuantTensor:
    """The rows of all parts, which have one scheme, one number of columns and one order of them.

    Codes keep their layout if all have the same, else they become bytes.
    """
    first = parts[0]
    if len({part.codes.layout for part in parts}) == 1:
        codes = replace(first.codes, data=np.concatenate([part.codes.data for part in parts]))
    else:
        codes = Codes.of_bytes(np.concatenate([part.codes.unpack() for part in parts]))

    def of(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return replace(
        first,
        codes=codes,
        scales=of("scales"),
        zeros=of("zeros"),
        super_scales=of("super_scales"),
        super_zeros=of("super_zeros"),
    )


def _is_finite(numbers: NDArray[Any]) -> bool:
    if numbers.dtype == np.float16:  # by its bits: ten times as fast as `isfinite`
        exponent = np.uint16(0x7C00)
        return not (numbers.view(np.uint16) & exponent == exponent).any()
    return bool(np.isfinite(numbers).all())


def _of_groups(of_group: NDArray[Any], of_super_block: NDArray[Any] | None) -> NDArray[np.float32]:
    values: NDArray[np.float32] = of_group.astype(np.float32)
    if of_super_block is not None:
        per_block = values.shape[1] // of_super_block.shape[1]
        values *= np.repeat(of_super_block.astype(np.float32), per_block, axis=1)
    return values


def _check(
    scheme: Scheme, name: str, part: NDArray[Any] | None, shape: tuple[int, int] | None, dtype: np.dtype[Any]
) -> None:
    """Refuse a part that is missing, too much, or other than expected; no shape: there must be none."""
    if part is None and shape is None:
        return
    if part is None or shape is None:
        raise ShapeError(f"{scheme.name}: {name} are {'missing' if part is None else 'not expected'}")
    if part.dtype != dtype:
        raise DTypeError(f"{scheme.name}: {name} must be {dtype}, not {part.dtype}")
    if part.shape != shape:
        raise ShapeError(f"{scheme.name}: {name} must be of shape {shape}, not {part.shape}")
