"""The gate of a SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("silu_mul", gate_up="T 2F : activation", out="T F : activation")


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, with silu(g) = g / (1 + e**-g).

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
    implementation("silu_mul", gate_up.device, gate_up.dtype).silu_mul(gate_up, out)
    return out


def reference(gate_up: NDArray[Any]) -> NDArray[np.float32]:
    """The formula in float64."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    result: NDArray[np.float32] = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    return result


def _inputs(tokens: int, width: int, padding: int = 0, scale: float = 3.0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        rows = rng.standard_normal((tokens, 2 * width + padding), np.float32) * np.float32(scale)
        return {"gate_up": rows[:, : 2 * width]}

    return make


CASES = [
    Case(name, silu_mul, reference, inputs, activations=("gate_up",), benchmark=benchmark)
    for name, inputs, benchmark in (
        ("one", _inputs(1, 1), False),
        ("odd", _inputs(3, 37), False),
        ("strided", _inputs(5, 50, 7), False),
        ("large-values", _inputs(2, 100, scale=60.0), False),
        ("several-blocks", _inputs(3, 5003), False),
        ("several-blocks-of-vectors", _inputs(2, 4104, 8), False),
        ("decode", _inputs(1, 8192), True),
        ("prefill", _inputs(512, 8192), True),
    )
]
