"""Elementwise sum."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("add", x="T D : activation", y="T D : activation", out="T D : activation")


def add(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x + y, element by element.

    Args:
        x: [T, D].
        y: [T, D].
        out: [T, D], where the sum goes; may be `x` or `y` (default: a new tensor).

    Raises:
        ShapeError: the shapes differ.
        DTypeError: the tensors are not of one floating-point type.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(x, y, out)
    if out is None:
        out = Tensor.empty(x.shape, x.dtype, x.device)
    implementation("add", x.device, x.dtype).add(x, y, out)
    return out


def reference(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """The sum in NumPy."""
    result: NDArray[Any] = x + y
    return result


def _inputs(tokens: int, width: int, padding: int = 0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        x, y = (rng.standard_normal((tokens, width + padding), np.float32)[:, :width] for _ in range(2))
        return {"x": x, "y": y}

    return make


CASES = [
    Case(name, add, reference, inputs, activations=("x", "y"), benchmark=benchmark)
    for name, inputs, benchmark in (
        ("one", _inputs(1, 1), False),
        ("odd", _inputs(3, 37), False),
        ("strided", _inputs(5, 50, 7), False),
        ("several-blocks", _inputs(2, 4104, 8), False),
        ("decode", _inputs(1, 2048), True),
        ("prefill", _inputs(512, 2048), True),
    )
]
