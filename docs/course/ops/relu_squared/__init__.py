"""The squared rectifier (So et al. 2021, arXiv:2109.08668)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("relu_squared", x="T D", out="T D")


def relu_squared(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """max(x, 0)², element by element.

    Args:
        x: float32 [T, D].
        out: float32 [T, D], where the result goes; may be `x` (default: a new tensor).

    Raises:
        ShapeError: the shapes contradict the contract.
        DTypeError: a tensor is not float32.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(x, out)
    if out is None:
        out = Tensor.empty(x.shape, x.dtype, x.device)
    implementation("relu_squared", x.device).relu_squared(x, out)
    return out


def reference(x: NDArray[Any]) -> NDArray[np.float32]:
    """The formula in float64."""
    result: NDArray[np.float32] = (np.maximum(x.astype(np.float64), 0) ** 2).astype(np.float32)
    return result


def _inputs(tokens: int, width: int, padding: int = 0, scale: float = 1.0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        x = rng.standard_normal((tokens, width + padding), np.float32) * np.float32(scale)
        return {"x": x[:, :width]}

    return make


CASES = [
    Case(name, relu_squared, reference, inputs)
    for name, inputs in (
        ("one", _inputs(1, 1)),
        ("odd", _inputs(3, 37)),
        ("strided", _inputs(5, 48, 7)),
        ("large-values", _inputs(2, 100, scale=1e10)),
        ("several-rows-a-thread", _inputs(64, 256)),
    )
]
