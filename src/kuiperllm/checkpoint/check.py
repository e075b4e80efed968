"""Looks at every weight of a checkpoint for what no model can use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import Checkpoint, Progress
from kuiperllm.quant import QuantTensor

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class BadTensor:
    """A tensor that holds what is no number."""

    name: str
    nan: int
    """Elements that are NaN; of quantized matrices, scales, minimums and codes that stand for NaN."""
    infinite: int

    def __str__(self) -> str:
        parts = [f"{n} {what}" for n, what in ((self.nan, "NaN"), (self.infinite, "infinite")) if n]
        return f"{self.name}: {' and '.join(parts)}"


def find_bad_tensors(checkpoint: Checkpoint, progress: Progress | None = None) -> list[BadTensor]:
    """The tensors that hold NaN or infinities, in the order of their names.

    Args:
        checkpoint: is read in full, some megabytes at a time.
        progress: told of it as (what, bytes done, bytes in all).

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    bad, done = [], 0
    for name in sorted(checkpoint.tensors):
        nan, infinite = _count(checkpoint.load(name, check=False))
        if nan or infinite:
            bad.append(BadTensor(name, nan, infinite))
        checkpoint.release(name)
        done += checkpoint.tensors[name].nbytes
        if progress is not None:
            progress("checking", done, total)
    return bad


def _count(weight: NDArray[Any] | QuantTensor) -> tuple[int, int]:
    """How many elements are NaN, and how many are infinite."""
    if isinstance(weight, QuantTensor):
        parts = [part for part in weight.arrays[1:] if part.dtype in (np.float16, np.float32)]
        if weight.scheme.coding == "e4m3":
            parts.append(weight.codes.unpack().view(ml_dtypes.float8_e4m3fn))
        found = [_count(part) for part in parts]
        return sum(nan for nan, _ in found), sum(infinite for _, infinite in found)
    nan = infinite = 0
    step = max(1, _PIECE_BYTES // max(1, weight[:1].nbytes)) if weight.size else 1
    for first in range(0, len(weight), step):
        piece = weight[first : first + step]
        if not np.isfinite(piece).all():
            nan += int(np.isnan(piece).sum())
            infinite += int(np.isinf(piece).sum())
    return nan, infinite
