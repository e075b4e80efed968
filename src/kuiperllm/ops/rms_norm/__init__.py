"""Root mean square layer normalization (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("rms_norm", x="... D : activation", weight="D", out="... D : activation")
ADD_CONTRACT = Contract(
    "add_rms_norm",
    writes=("residual", "out"),
    residual="T D : activation",
    x="T D : activation",
    weight="D",
    out="T D : activation",
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight, with the mean over each row.

    Args:
        x: [T, D], or [T, H, d] to normalize each head by itself; rows may be strided, as the heads
            of a fused query-key-value tensor are.
        weight: float32 [D], or [d]. A GPU takes it for a constant and reads it while earlier kernels still
            run: `synchronize()` the device first if one of them makes it.
        eps: is added to the mean square, above or equal 0.
        out: of the shape and type of `x`, where the result goes; may be `x` (default: a new tensor).

    Raises:
        ShapeError: the shapes contradict the contract, or x has more than three axes.
        DTypeError: the weight is not float32, or the others are not of one floating-point type.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(x, weight, out)
    if out is None:
        out = Tensor.empty(x.shape, x.dtype, x.device)
    implementation("rms_norm", x.device, x.dtype).rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """Add `x` to `residual` in place, and normalize the sum: rms_norm(residual + x).

    Args:
        residual: [T, D], becomes residual + x.
        x: [T, D].
        weight: float32 [D]; as for `rms_norm`.
        eps: as for `rms_norm`.
        out: [T, D], where the normalized sum goes; may be `x` (default: a new tensor).

    Raises:
        ShapeError: the shapes contradict the contract.
        DTypeError: the weight is not float32, or the others are not of one floating-point type.
        DeviceError: the tensors live on different devices.
    """
    ADD_CONTRACT.check(residual, x, weight, out)
    if out is None:
        out = Tensor.empty(x.shape, x.dtype, x.device)
    implementation("rms_norm", x.device, x.dtype).add_rms_norm(residual, x, weight, eps, out)
    return out


def reference(x: NDArray[Any], weight: NDArray[Any], eps: float) -> NDArray[np.float32]:
    """The formula in float64."""
    wide = x.astype(np.float64)
    scale = 1 / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + eps)
    result: NDArray[np.float32] = (wide * scale * weight).astype(np.float32)
    return result


def add_reference(
    residual: NDArray[Any], x: NDArray[Any], weight: NDArray[Any], eps: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The new residual, and its norm."""
    total = residual + x
    return total, reference(total, weight, eps)


def _inputs(*shape: int, padding: int = 0, scale: float = 1.0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        *leading, width = shape
        x = rng.standard_normal((*leading, width + padding), np.float32)[..., :width] * np.float32(scale)
        return {"x": x, "weight": rng.standard_normal(width, np.float32), "eps": 1e-5}

    return make


def _heads(tokens: int, heads: int, head_dim: int) -> Any:
    """The middle heads of a fused tensor."""

    def make(rng: np.random.Generator) -> dict[str, Any]:
        fused = rng.standard_normal((tokens, 3 * heads * head_dim), np.float32)
        x = fused[:, heads * head_dim : 2 * heads * head_dim].reshape(tokens, heads, head_dim)
        return {"x": x, "weight": rng.standard_normal(head_dim, np.float32), "eps": 1e-6}

    return make


def _with_residual(make_x: Any) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        arguments = make_x(rng)
        return {"residual": rng.standard_normal(arguments["x"].shape, np.float32), **arguments}

    return make


CASES = [
    *(
        Case(name, rms_norm, reference, x, activations=("x",), benchmark=benchmark)
        for name, x, benchmark in (
            ("one", _inputs(1, 1), False),
            ("odd", _inputs(3, 37), False),
            ("strided", _inputs(5, 70, padding=3), False),
            ("heads", _heads(3, 4, 40), False),
            ("tiny", _inputs(2, 48, scale=1e-4), False),
            ("narrow", _inputs(5, 96), False),
            ("wide", _inputs(2, 8200, padding=8), False),
            ("wide-odd", _inputs(2, 1031), False),
            ("decode", _inputs(1, 2048), True),
            ("prefill", _inputs(512, 2048), True),
            ("qk-decode", _heads(1, 16, 128), True),
            ("qk-prefill", _heads(512, 16, 128), True),
        )
    ),
    *(
        Case(
            name,
            add_rms_norm,
            add_reference,
            _with_residual(x),
            writes=("residual",),
            activations=("residual", "x"),
            benchmark=benchmark,
        )
        for name, x, benchmark in (
            ("odd", _inputs(3, 37), False),
            ("strided", _inputs(5, 70, padding=3), False),
            ("narrow", _inputs(5, 96), False),
            ("wide", _inputs(2, 8200, padding=8), False),
            ("decode", _inputs(1, 2048), True),
            ("prefill", _inputs(512, 2048), True),
        )
    ),
]
