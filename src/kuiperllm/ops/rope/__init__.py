"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("rope", writes=("x",), x="T H 2h : activation", positions="T : int32", cos_sin="P 2h")


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn pairs of elements of each head by angles that grow with the position, in place.

    A pair (a, b) becomes (a cos - b sin, a sin + b cos). Pair i of h is (i, i + h), the convention of Hugging
    Face checkpoints, or (2i, 2i + 1) if `interleaved`, that of Meta's and llama2.c's.

    Args:
        x: [T, H, d] with d = 2h; tokens and heads may be strided, as in a fused query-key-value
            tensor.
        positions: int32 [T], each from 0 to P - 1. Others are taken for the nearest of these, so that a
            wrong position gives a wrong result but never reads outside the table.
        cos_sin: float32 [P, d], for each position h cosines and h sines; see `frequencies.cos_sin_table`.
        interleaved: which elements are pairs.

    Returns:
        `x`.

    Raises:
        ShapeError: the shapes contradict the contract; d is odd.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(x, positions, cos_sin)
    implementation("rope", x.device, x.dtype).rope(x, positions, cos_sin, interleaved)
    return x


def reference(
    x: NDArray[Any], positions: NDArray[Any], cos_sin: NDArray[Any], interleaved: bool = False
) -> NDArray[Any]:
    """The pairs turned, in float64."""
    half = x.shape[-1] // 2
    cos, sin = (
        table[positions, None, :].astype(np.float64) for table in (cos_sin[:, :half], cos_sin[:, half:])
    )
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    )
    a, b = x[..., first], x[..., second]
    turned = np.empty(x.shape, np.float32)
    turned[..., first] = a * cos - b * sin
    turned[..., second] = a * sin + b * cos
    return turned


def _inputs(tokens: int, heads: int, head_dim: int, interleaved: bool = False, fused: int = 0) -> Any:
    """`fused`: elements of other projections in the rows that x is a part of."""

    def make(rng: np.random.Generator) -> dict[str, Any]:
        width = heads * head_dim
        rows = rng.standard_normal((tokens, width + fused), np.float32)
        angles = rng.uniform(0, 2 * np.pi, (2 * tokens + 1, head_dim // 2))
        return {
            "x": rows[:, :width].reshape(tokens, heads, head_dim),
            "positions": rng.integers(0, 2 * tokens + 1, tokens, np.int32),
            "cos_sin": np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32),
            "interleaved": interleaved,
        }

    return make


CASES = [
    Case(name, rope, reference, inputs, writes=("x",), activations=("x",), benchmark=benchmark)
    for name, inputs, benchmark in (
        ("smallest", _inputs(1, 1, 2), False),
        ("odd-half", _inputs(3, 2, 46), False),
        ("fused", _inputs(5, 3, 64, fused=70), False),
        ("vectors", _inputs(5, 3, 64, fused=64), False),
        ("interleaved", _inputs(5, 3, 46, True, fused=7), False),
        ("interleaved-vectors", _inputs(5, 3, 64, True, fused=64), False),
        ("decode", _inputs(1, 40, 64, fused=512), True),
        ("prefill", _inputs(512, 40, 64, fused=512), True),
    )
]
