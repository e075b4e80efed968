"""The weights of a linear layer, in the layout that the kernels of one device read fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from kuiperllm.ops.dispatch import implementation
from kuiperllm.quant import QuantTensor, Scheme

Rows = NDArray[Any] | QuantTensor
"""Rows of a weight matrix as a checkpoint holds them: floating point [n, K], or quantized."""

WeightFormat = DType | Scheme
"""What a weight matrix is kept in: a floating-point type, or a scheme of quantizing."""

Rounding = int | DType | None
"""What x is rounded to before it is multiplied: int8 groups of so many columns, bfloat16, or nothing."""

_COLUMNS_UNIT = 32


def format_of(rows: Rows) -> WeightFormat:
    """What rows are stored in.

    Raises:
        DTypeError: an array of a type that is not supported.
    """
    return rows.scheme if isinstance(rows, QuantTensor) else DType.of(rows.dtype)


def can_be_kept(scheme: Scheme, columns: int) -> bool:
    """Whether kernels multiply by rows of so many weights in a scheme.

    Groups have 16 columns or whole multiples of 32; codes of fewer than 8 bits are packed for 32 columns at a
    time.
    """
    unit = scheme.columns_unit if scheme.bits == 8 else max(scheme.columns_unit, _COLUMNS_UNIT)
    return (scheme.group_size == 16 or scheme.group_size % 32 == 0) and columns % unit == 0


class PackedSizes(NamedTuple):
    """Memory of a packed matrix, in elements."""

    data: int
    """Bytes of values or codes."""
    scales: int
    """Elements of `LinearWeight.scales`."""
    super_scales: int
    """Elements of `LinearWeight.super_scales`."""
    bias: int
    """Elements of the bias, if there is one."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeight:
    """A matrix [N, K] that `linear` multiplies by, and `embedding` looks rows up in.

    Make one with `empty` and fill it with `write_rows`, or with `pack` at once.
    """

    format: WeightFormat
    """float32, float16, bfloat16 or a scheme."""
    out_features: int
    """N, the rows of the matrix."""
    in_features: int
    """K, the columns of the matrix."""
    data: Tensor
    """uint8: the packed values or codes; the layout belongs to the device's kernels."""
    scales: Tensor | None = None
    """Of a quantized matrix: the scales, with what else each group has, of the scheme's type; the layout
    belongs to the device's kernels. Zero points are stored as numbers of that type. None if they are in
    `data`."""
    super_scales: Tensor | None = None
    """float16: of schemes with super-blocks, the scale of scales, and that of minimums. None: as above."""
    columns: Tensor | None = None
    """int32 [K]: column j of the packed matrix multiplies element `columns[j]` of x; None: element j."""
    bias: Tensor | None = None
    """float32, one per row, padded with zeros as the kernels need it."""

    @classmethod
    def empty(
        cls,
        format: WeightFormat,
        out_features: int,
        in_features: int,
        *,
        columns: NDArray[np.int32] | None = None,
        bias: bool = False,
        device: Device | str = "cpu",
    ) -> LinearWeight:
        """Memory for a matrix whose rows `write_rows` will fill.

        Raises:
            DTypeError: the format is neither a floating-point type nor a scheme.
            ShapeError: the matrix cannot be kept in this scheme; see `can_be_kept`.
            OutOfMemoryError: the device has not enough memory.
        """
        scheme = format if isinstance(format, Scheme) else None
        if scheme is None and not (isinstance(format, DType) and format.is_float):
            raise DTypeError(f"linear: weights cannot be kept in {format!s}")
        if scheme is not None and not can_be_kept(scheme, in_features):
            raise ShapeError(f"linear: groups of {scheme.group_size} do not divide {in_features} columns")
        device = Device(device)
        sizes: PackedSizes = implementation("linear", device).packed_sizes(format, out_features, in_features)

        def make(count: int, dtype: DType) -> Tensor | None:
            return Tensor.empty((count,), dtype, device) if count else None

        return cls(
            format=format,
            out_features=out_features,
            in_features=in_features,
            data=Tensor.empty((sizes.data,), DType.uint8, device),
            scales=None if scheme is None else make(sizes.scales, scheme.scale),
            super_scales=make(sizes.super_scales, DType.float16),
            columns=None if columns is None else Tensor.from_numpy(columns).to(device),
            bias=Tensor.zeros((sizes.bias,), DType.float32, device) if bias else None,
        )

    @classmethod
    def pack(
        cls, rows: Rows, bias: NDArray[Any] | None = None, *, device: Device | str = "cpu"
    ) -> LinearWeight:
        """The matrix of `rows`, with an optional bias [N], laid out for `device`."""
        columns = rows.columns if isinstance(rows, QuantTensor) else None
        weight = cls.empty(
            format_of(rows), *rows.shape, columns=columns, bias=bias is not None, device=device
        )
        weight.write_rows(0, rows)
        if bias is not None:
            weight.write_bias(0, bias)
        return weight

    def write_rows(self, first: int, rows: Rows) -> None:
        """Lay out some rows of the matrix.

        Args:
            first: number of the first of them; a multiple of 16.
            rows: floating point of any type, which is converted, or rounded to codes where the scheme is
                symmetric (`middle`) with float16 scales; or rows of this weight's scheme. Their number is a
                multiple of 16 unless they are the last.

        Raises:
            ShapeError: the rows do not fit.
            DTypeError: the rows cannot be brought into this weight's format.
            CheckpointError: a weight to be rounded is NaN or infinite.
            UnsupportedError: a weight to be rounded is too large.
        """
        found = format_of(rows)
        if not self._takes(found):
            raise DTypeError(f"linear: cannot write {found} rows to {self.format} weights")
        count, columns = rows.shape
        after = first + count
        if columns != self.in_features or first % 16 or after > self.out_features:
            raise ShapeError(
                f"linear: rows {first} to {after} of {columns} columns do not fit weights of shape "
                f"[{self.out_features}, {self.in_features}]"
            )
        if count % 16 and after != self.out_features:
            raise ShapeError(f"linear: {count} rows are not a multiple of 16, and not the last")
        implementation("linear", self.device).write_rows(self, first, rows)

    def _takes(self, format: WeightFormat) -> bool:
        """Whether rows of a format can be written."""
        if isinstance(format, Scheme) or self.scheme is None:
            return format == self.format or (self.scheme is None and isinstance(format, DType))
        return self.scheme.coding == "middle" and self.scheme.scale is DType.float16 and format.is_float

    def write_bias(self, first: int, bias: NDArray[Any]) -> None:
        """Set the biases of rows `first` and on.

        Raises:
            ShapeError: there are more than rows, or this weight was made without bias.
        """
        if self.bias is None or bias.ndim != 1 or first + len(bias) > self.out_features:
            raise ShapeError(f"linear: a bias of shape {list(bias.shape)} at row {first} does not fit")
        values = Tensor.from_numpy(np.ascontiguousarray(bias, np.float32))
        self.bias[first : first + len(bias)].copy_(values.to(self.device))

    @property
    def scheme(self) -> Scheme | None:
        """How the matrix is quantized, if it is."""
        return self.format if isinstance(self.format, Scheme) else None

    @property
    def group_size(self) -> int:
        """Columns that share a scale; 0 if the matrix is not quantized."""
        return self.format.group_size if isinstance(self.format, Scheme) else 0

    @property
    def device(self) -> Device:
        """Where the weights live."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything together."""
        parts = self.data, self.scales, self.super_scales, self.columns, self.bias
        return sum(part.nbytes for part in parts if part is not None)

    def __repr__(self) -> str:
        return f"LinearWeight([{self.out_features}, {self.in_features}], {self.format}, {self.device})"


def check_rounded(failed: int) -> None:
    """Say what kept a kernel from rounding weights to groups.

    Args:
        failed: 0: nothing. 1: a weight is NaN or infinite. 2: one is too large for a float16 scale.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        UnsupportedError: a weight is too large.
    """
    if failed == 1:
        raise CheckpointError(
            "a weight is NaN or infinite; the checkpoint is damaged and cannot be quantized"
        )
    if failed == 2:
        raise UnsupportedError(
            "a weight is too large for groups, whose scale is float16; run without quantization"
        )
