"""The weights of a linear layer, in the layout that the kernels of one device read fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from kuiperllm.ops.dispatch import implementation
from kuiperllm.quant.q8 import Q8Tensor

Rows = NDArray[Any] | Q8Tensor
"""Rows of a weight matrix as a checkpoint holds them: floating point [n, K], or int8 groups."""

_FLOATS = ("float32", "float16", "bfloat16")
FORMATS = (*_FLOATS, "q8")


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeight:
    """A matrix [N, K] that `linear` multiplies by, and `embedding` looks rows up in.

    Make one with `empty` and fill it with `write_rows`, or with `pack` at once.
    """

    format: str
    """One of `FORMATS`."""
    out_features: int
    """N, the rows of the matrix."""
    in_features: int
    """K, the columns of the matrix."""
    data: Tensor
    """uint8: the packed values; the layout belongs to the device's kernels."""
    scales: Tensor | None = None
    """q8: the packed scales, float16 or float32."""
    group_size: int = 0
    """q8: columns that share a scale."""
    bias: Tensor | None = None
    """float32, one per row, padded with zeros as the kernels need it."""

    @classmethod
    def empty(
        cls,
        format: str,
        out_features: int,
        in_features: int,
        *,
        group_size: int = 0,
        scale_dtype: DType = DType.float16,
        bias: bool = False,
        device: Device | str = "cpu",
    ) -> LinearWeight:
        """Memory for a matrix whose rows `write_rows` will fill.

        Raises:
            DTypeError: the format is unknown.
            ShapeError: `group_size` does not divide K.
            OutOfMemoryError: the device has not enough memory.
        """
        if format not in FORMATS:
            raise DTypeError(f"linear: weight format {format!r} is unknown; known: {', '.join(FORMATS)}")
        if format == "q8" and (group_size < 1 or in_features % group_size):
            raise ShapeError(f"linear: groups of {group_size} do not divide {in_features} columns")
        device = Device(device)
        sizes = implementation("linear", device).packed_sizes(format, out_features, in_features, group_size)
        data_bytes, num_scales, num_bias = sizes
        return cls(
            format=format,
            out_features=out_features,
            in_features=in_features,
            data=Tensor.empty((data_bytes,), DType.uint8, device),
            scales=Tensor.empty((num_scales,), scale_dtype, device) if format == "q8" else None,
            group_size=group_size,
            bias=Tensor.zeros((num_bias,), DType.float32, device) if bias else None,
        )

    @classmethod
    def pack(
        cls, rows: Rows, bias: NDArray[Any] | None = None, *, device: Device | str = "cpu"
    ) -> LinearWeight:
        """The matrix of `rows`, with an optional bias [N], laid out for `device`."""
        n, k = rows.shape
        if isinstance(rows, Q8Tensor):
            weight = cls.empty(
                "q8",
                n,
                k,
                group_size=rows.group_size,
                scale_dtype=DType.of(rows.scales.dtype),
                bias=bias is not None,
                device=device,
            )
        else:
            weight = cls.empty(rows.dtype.name, n, k, bias=bias is not None, device=device)
        weight.write_rows(0, rows)
        if bias is not None:
            weight.write_bias(0, bias)
        return weight

    def write_rows(self, first: int, rows: Rows) -> None:
        """Lay out some rows of the matrix.

        Args:
            first: number of the first of them; a multiple of 16.
            rows: floating point of any type, which is converted, or rounded to int8 groups with float16
                scales; or int8 groups of this weight's size. Their number is a multiple of 16 unless they
                are the last.

        Raises:
            ShapeError: the rows do not fit.
            DTypeError: the rows cannot be brought into this weight's format.
            CheckpointError: a weight to be rounded to int8 is NaN or infinite.
            UnsupportedError: a weight to be rounded to int8 is too large.
        """
        found = "q8" if isinstance(rows, Q8Tensor) else rows.dtype.name
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
        if isinstance(rows, Q8Tensor) and rows.group_size != self.group_size:
            raise ShapeError(
                f"linear: groups of {rows.group_size} do not fit weights in groups of {self.group_size}"
            )
        implementation("linear", self.device).write_rows(self, first, rows)

    def _takes(self, format: str) -> bool:
        """Whether rows of a format can be written."""
        if self.scales is None:
            return format in _FLOATS
        return format == "q8" or (format in _FLOATS and self.scales.dtype is DType.float16)

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
    def device(self) -> Device:
        """Where the weights live."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and bias together."""
        return sum(t.nbytes for t in (self.data, self.scales, self.bias) if t is not None)

    def __repr__(self) -> str:
        groups = f", groups of {self.group_size}" if self.format == "q8" else ""
        return (
            f"LinearWeight([{self.out_features}, {self.in_features}], {self.format}{groups}, {self.device})"
        )


def check_rounded(failed: int) -> None:
    """Say what kept a kernel from rounding weights to int8 groups.

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
            "a weight is too large for int8 groups, whose scale is float16; run without quantization"
        )
