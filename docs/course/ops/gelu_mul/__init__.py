"""The gate of a GeGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202), as Gemma has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("gelu_mul", gate_up="T 2F : activation", out="T F : activation")


def gelu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up, with gelu(g) = g / (1 + e**-2z) and z = sqrt(2 / pi) (g + 0.044715 g³).

    This is the tanh form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415):
    g / 2 (1 + tanh z), and (1 + tanh z) / 2 = 1 / (1 + e**-2z).

    Args:
        gate_up: [T, 2F]: F columns of gate, then F columns of up.
        out: [T, F], where the result goes (default: a new tensor).

    Raises:
        ShapeError: the shapes contradict the contract.
        DTypeError: the tensors are not of one floating-point type.
        DeviceError: the tensors live on different devices.
    """
    sizes = CONTRACT.check(gate_up, out)
    if out is None:
        out = Tensor.empty((sizes["T"], sizes["F"]), gate_up.dtype, gate_up.device)
    implementation("gelu_mul", gate_up.device, gate_up.dtype).gelu_mul(gate_up, out)
    return out


def reference(gate_up: NDArray[Any]) -> NDArray[np.float32]:
    """The formula with tanh, in float64: not the form that the kernel computes."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    result: NDArray[np.float32] = (gate / 2 * (1 + np.tanh(inner)) * up).astype(np.float32)
    return result


def _inputs(tokens: int, width: int, padding: int = 0, scale: float = 3.0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        rows = rng.standard_normal((tokens, 2 * width + padding), np.float32) * np.float32(scale)
        return {"gate_up": rows[:, : 2 * width]}

    return make


CASES = [
    Case(name, gelu_mul, reference, inputs, activations=("gate_up",), atol=2e-6)
    for name, inputs in (
        ("one", _inputs(1, 1)),
        ("odd", _inputs(3, 37)),
        ("strided", _inputs(5, 50, 7)),
        ("large-values", _inputs(2, 100, scale=60.0)),
        ("several-blocks", _inputs(3, 5003)),
    )
]
