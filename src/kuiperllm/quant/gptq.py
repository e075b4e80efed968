"""Rounding a matrix so that its products change little, by GPTQ (Frantar et al. 2023, arXiv:2210.17323).

A weight that was rounded leaves an error, and the weights of its row that are not rounded yet are changed to
make up for it as well as they can. How well depends on the inputs x of the matrix, of which only the sums
H = X^T X matter. Columns are taken in the order of their importance, the diagonal of H, the largest first;
scales are those of the unchanged matrix, so that groups remain neighbouring columns whatever the order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kuiperllm.quant.codes import Codes
from kuiperllm.quant.rounding import quantize
from kuiperllm.quant.scheme import Scheme
from kuiperllm.quant.tensor import QuantTensor

Floats = NDArray[np.float32]

_DAMPING = 0.01  # of the mean importance, added to all, as in the paper
_MORE_DAMPING = 10.0  # times that, where rounding errors have made H indefinite
_FEW = 16  # columns that are rounded one after the other before others hear of their errors
_LEAF = 128  # size of the triangles that LAPACK is given


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """How errors in some columns are made up for in others; the same for all matrices with one input."""

    importance: Floats
    """The diagonal of H, [K]."""
    order: NDArray[np.intp]
    """Columns from the most important one down, [K]."""
    upper: Floats
    """U with U^T U = H^-1 of columns in this order: upper triangular [K, K]."""

    @classmethod
    def of(cls, hessian: Floats) -> Feedback:
        """From H, the sum of x x^T over inputs x: float32 [K, K].

        H is R R^T for an upper triangular R, and U is R^-1. Besides H and U nothing of their size is in
        memory.
        """
        importance = np.diagonal(hessian).copy()
        order = np.argsort(-importance, kind="stable")
        damping = _DAMPING * float(importance.mean(dtype=np.float64)) or 1.0
        while True:
            upper = hessian[np.ix_(order, order)]
            upper[np.diag_indices(len(upper))] += np.float32(damping)
            try:
                _factor(upper)
                break
            except np.linalg.LinAlgError:
                damping *= _MORE_DAMPING
        _invert(upper)
        return cls(importance, order, upper)


def gptq(w: Floats, feedback: Feedback, scheme: Scheme) -> QuantTensor:
    """Round rows of a matrix, [N, K], to codes. Rows do not depend on each other.

    Args:
        w: float32 [N, K], finite.
        feedback: of the matrix's inputs.
        scheme: any that `quantize` takes.

    Raises:
        ShapeError: groups do not divide rows.
        CheckpointError: `w` holds NaN or infinity.
        UnsupportedError: a weight is too large for a float16 scale.
    """
    rounded = quantize(w, scheme, search=True, importance=feedback.importance)
    columns = np.ascontiguousarray(w.T[feedback.order])
    codes = _round_columns(columns, feedback, _Grid(rounded))
    return replace(rounded, codes=Codes.packed(codes, rounded.codes.layout))


class _Grid:
    """What codes of each column stand for: offset + scale * code."""

    def __init__(self, tensor: QuantTensor) -> None:
        scheme = tensor.scheme
        self._group_size = scheme.group_size
        self._scales = np.ascontiguousarray(tensor.group_scales().T)  # [groups, N]
        minimums = tensor.group_minimums()
        if minimums is not None:
            self._offsets = -np.ascontiguousarray(minimums.T)
        elif tensor.zeros is not None:
            self._offsets = -self._scales * tensor.zeros.T
        else:
            self._offsets = -self._scales * np.float32(scheme.middle)
        # int8 leaves its lowest value out, so that it is symmetric.
        self._low = np.float32(1 if scheme.bits == 8 and scheme.coding == "middle" else 0)
        self._high = np.float32((1 << scheme.bits) - 1)
        self._nonzero = np.where(self._scales == 0, np.float32(1), self._scales)

    def round(self, column: int, weights: Floats) -> tuple[Floats, Floats]:
        """Codes of the weights [N] of a column, and what they stand for."""
        group = column // self._group_size
        codes = np.rint((weights - self._offsets[group]) / self._nonzero[group])
        np.clip(codes, self._low, self._high, out=codes)
        return codes, codes * self._scales[group] + self._offsets[group]


def _round_columns(columns: Floats, feedback: Feedback, grid: _Grid) -> NDArray[np.uint8]:
    """The codes [N, K] of columns [K, N] that lie in the feedback's order and are overwritten."""
    codes = np.empty(columns.shape, np.uint8)
    order, upper = feedback.order, feedback.upper

    def in_range(start: int, end: int) -> None:
        """Round some columns, each of which becomes the error that it leaves; by halves, for caches."""
        if end - start > _FEW:
            middle = (start + end) // 2
            in_range(start, middle)
            columns[middle:end] -= upper[start:middle, middle:end].T @ columns[start:middle]
            in_range(middle, end)
            return
        for j in range(start, end):
            found, values = grid.round(int(order[j]), columns[j])
            codes[order[j]] = found
            columns[j] = (columns[j] - values) / upper[j, j]
            columns[j + 1 : end] -= upper[j, j + 1 : end, None] * columns[j]

    in_range(0, len(columns))
    return np.ascontiguousarray(codes.T)


# --- triangles: upper ones, in place, by halves -----------------------------------------------------------


def _factor(matrix: Floats) -> None:
    """Replace a symmetric matrix by the R with matrix = R R^T.

    Raises:
        numpy.linalg.LinAlgError: it is not positive definite.
    """
    if len(matrix) <= _LEAF:  # the lower factor of the matrix backwards, backwards
        matrix[:] = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
        return
    half = len(matrix) // 2
    first, beside, second = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _factor(second)
    _divide(beside, second)
    first -= beside @ beside.T
    _factor(first)
    matrix[half:, :half] = 0


def _divide(matrix: Floats, upper: Floats) -> None:
    """matrix = matrix upper^-T."""
    if len(upper) <= _LEAF:
        matrix[:] = matrix @ np.linalg.inv(upper).T
        return
    half = len(upper) // 2
    left, right = matrix[:, :half], matrix[:, half:]
    _divide(right, upper[half:, half:])
    left -= right @ upper[:half, half:].T
    _divide(left, upper[:half, :half])


def _invert(upper: Floats) -> None:
    """upper = upper^-1; of [[A, B], [0, C]] it is [[A^-1, -A^-1 B C^-1], [0, C^-1]]."""
    if len(upper) <= _LEAF:
        upper[:] = np.triu(np.linalg.inv(upper))
        return
    half = len(upper) // 2
    first, beside, second = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert(first)
    _invert(second)
    beside[:] = -(first @ beside) @ second
