"""The most likely token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import DType, Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("argmax", x="T V", out="T : int32")


def argmax(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Where the largest element of each row is; the first of equal ones.

    NaN is never the largest. A row of nothing but NaN gives 0.

    Args:
        x: float32 [T, V] with V at least 1.
        out: int32 [T], where the result goes (default: a new tensor).

    Raises:
        ShapeError: the shapes contradict the contract, or V is 0.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(x, out)
    if x.shape[1] == 0:
        raise ShapeError(f"argmax: x has shape {list(x.shape)}: there is no largest of no elements")
    if out is None:
        out = Tensor.empty(x.shape[:1], DType.int32, x.device)
    implementation("argmax", x.device).argmax(x, out)
    return out


def reference(x: NDArray[Any]) -> NDArray[np.int32]:
    """NumPy's, with NaN below everything."""
    order = np.where(np.isnan(x), -np.inf, x)
    best = order.max(axis=1, keepdims=True)
    candidates = (x == best) | np.isnan(x).all(axis=1, keepdims=True)
    result: NDArray[np.int32] = candidates.argmax(axis=1).astype(np.int32)
    return result


def _inputs(tokens: int, width: int, padding: int = 0, values: int = 0) -> Any:
    """`values`: how many different ones there are (0: as many as elements)."""

    def make(rng: np.random.Generator) -> dict[str, Any]:
        rows = rng.standard_normal((tokens, width + padding), np.float32)
        if values:
            rows = rng.integers(0, values, rows.shape).astype(np.float32)
        return {"x": rows[:, :width]}

    return make


def _special(rng: np.random.Generator) -> dict[str, Any]:
    rows = rng.choice(np.array([np.nan, -np.inf, np.inf, 0.0, -0.0, -1.0], np.float32), (40, 6))
    rows[:3] = [[np.nan], [-np.inf], [np.inf]]
    rows[3, 1:] = -np.inf
    rows[3, 0] = np.nan
    return {"x": rows}


CASES = [
    Case("one", argmax, reference, _inputs(1, 1)),
    Case("odd", argmax, reference, _inputs(30, 37)),
    Case("strided", argmax, reference, _inputs(5, 70, 3)),
    Case("ties", argmax, reference, _inputs(50, 100, values=3)),
    Case("ties-between-chunks", argmax, reference, _inputs(9, 50_001, values=2)),
    Case("special-values", argmax, reference, _special),
    Case("vocabulary", argmax, reference, _inputs(1, 151_936), benchmark=True),
]
