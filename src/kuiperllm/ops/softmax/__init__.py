"""Probabilities from logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("softmax", x="T V", out="T V")


def softmax(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """e**(x - max x) / sum of the same, for each row.

    A row that holds NaN or plus infinity, or nothing but minus infinity, becomes NaN.

    Args:
        x: float32 [T, V].
        out: float32 [T, V], where the result goes; may be `x` (default: a new tensor).

    Raises:
        ShapeError: the shapes contradict the contract.
        DTypeError: a tensor is not float32.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(x, out)
    if out is None:
        out = Tensor.empty(x.shape, x.dtype, x.device)
    implementation("softmax", x.device).softmax(x, out)
    return out


def reference(x: NDArray[Any]) -> NDArray[np.float32]:
    """The formula in float64."""
    wide = x.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    result: NDArray[np.float32] = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return result


def _inputs(tokens: int, width: int, padding: int = 0, scale: float = 3.0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        rows = rng.standard_normal((tokens, width + padding), np.float32) * np.float32(scale)
        return {"x": rows[:, :width]}

    return make


CASES = [
    Case("one", softmax, reference, _inputs(1, 1)),
    Case("odd", softmax, reference, _inputs(3, 37)),
    Case("strided", softmax, reference, _inputs(5, 70, 3)),
    Case("several-blocks", softmax, reference, _inputs(2, 9001, 2)),
    Case("large-values", softmax, reference, _inputs(4, 200, scale=1e30)),
    Case("vocabulary", softmax, reference, _inputs(2, 151_936), atol=1e-9, rtol=1e-5, benchmark=True),
]
