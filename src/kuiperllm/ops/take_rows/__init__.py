"""Some rows of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("take_rows", x="T D : activation", rows="S : int32", out="S D : activation")


def take_rows(x: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Row `rows[s]` of x for each s; zeros where x has no such row.

    Args:
        x: [T, D].
        rows: int32 [S].
        out: [S, D], where the result goes; must not overlap x (default: a new tensor).

    Raises:
        ShapeError: the shapes contradict the contract.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    if out is None:
        out = Tensor.empty((*rows.shape, *x.shape[1:]), x.dtype, x.device)
    CONTRACT.check(x, rows, out)
    implementation("take_rows", x.device, x.dtype).take_rows(x, rows, out)
    return out


def reference(x: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """NumPy's indexing."""
    inside = (rows >= 0) & (rows < len(x))
    taken: NDArray[Any] = np.where(inside[:, None], x[np.where(inside, rows, 0)], np.float32(0))
    return taken


def _inputs(tokens: int, width: int, count: int, padding: int = 0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {
            "x": rng.standard_normal((tokens, width + padding), np.float32)[:, :width],
            "rows": rng.integers(-1, tokens + 1, count, np.int32),  # one outside at either end
        }

    return make


CASES = [
    Case("one", take_rows, reference, _inputs(1, 1, 1), activations=("x",)),
    Case("odd", take_rows, reference, _inputs(9, 37, 20), activations=("x",)),
    Case("strided", take_rows, reference, _inputs(5, 50, 7, padding=7), activations=("x",)),
    Case("vectors", take_rows, reference, _inputs(33, 512, 40), activations=("x",)),
]
