"""What an export did, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod, sqrt
from typing import Any

from kuiperllm.checkpoint.writing.convert import TensorReport


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did."""

    source: str
    source_format: str
    out: str
    format: str
    quant: str
    source_bytes: int
    """Of the tensors of the source."""
    out_bytes: int
    """Of all files that were written."""
    seconds: float
    tensors: tuple[TensorReport, ...]
    """In the order in which they were written."""
    notes: tuple[str, ...] = ()
    """What a user should know, a sentence each."""

    @property
    def matrices(self) -> list[TensorReport]:
        """The tensors that can be quantized."""
        return [tensor for tensor in self.tensors if len(tensor.shape) == 2]

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        weights = sum(prod(tensor.shape) for tensor in self.tensors)
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / weights

    @property
    def relative_error(self) -> float:
        """Root mean square of what changed, relative to that of the weights, of all that were rounded."""
        return relative_error(self.tensors)

    @property
    def max_error(self) -> float:
        """The largest change of a weight."""
        return max((tensor.max_error for tensor in self.tensors), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = {
            "bits_per_weight": self.bits_per_weight,
            "relative_error": self.relative_error,
            "max_error": self.max_error,
        }
        return {**asdict(self), **totals, "tensors": [_as_object(tensor) for tensor in self.tensors]}


def relative_error(tensors: Iterable[TensorReport]) -> float:
    """The relative error of several tensors as if they were one; those that did not change do not count."""
    tensors = list(tensors)
    squares = sum(tensor.squares for tensor in tensors)
    return sqrt(sum(tensor.squared_errors for tensor in tensors) / squares) if squares else 0.0


def _as_object(tensor: TensorReport) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "source": tensor.source,
        "stored": tensor.stored,
        "source_bytes": tensor.source_bytes,
        "bytes": tensor.nbytes,
        "bits_per_weight": tensor.bits_per_weight,
        "relative_error": tensor.relative_error,
        "max_error": tensor.max_error,
    }
