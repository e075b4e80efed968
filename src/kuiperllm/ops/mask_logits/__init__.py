"""Forbidding most tokens: what a grammar does at every step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("mask_logits", writes=("logits",), logits="S V", bits="S W : int32")


def mask_logits(logits: Tensor, bits: Tensor) -> Tensor:
    """Set the logits of forbidden tokens to minus infinity, in place.

    Args:
        logits: float32 [S, V]; rows may be strided.
        bits: int32 [S, W] with 32 W at least V: token v of a row stays as it is if bit v % 32 of word
            v // 32 is 1.

    Returns:
        `logits`.

    Raises:
        ShapeError: the shapes contradict the contract, or there are fewer bits than tokens.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    sizes = CONTRACT.check(logits, bits)
    if 32 * sizes["W"] < sizes["V"]:
        raise ShapeError(f"mask_logits: {sizes['W']} words have no bits for {sizes['V']} tokens")
    implementation("mask_logits", logits.device).mask_logits(logits, bits)
    return logits


def reference(logits: NDArray[Any], bits: NDArray[Any]) -> NDArray[Any]:
    """By unpacking the bits."""
    unpacked = np.unpackbits(bits.astype("<i4").view(np.uint8), axis=1, bitorder="little")
    masked: NDArray[Any] = np.where(unpacked[:, : logits.shape[1]] == 1, logits, np.float32(-np.inf))
    return masked


def _inputs(rows: int, vocabulary: int, padding: int = 0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        bits = rng.integers(-(2**31), 2**31, (rows, -(-vocabulary // 32)), np.int32)
        bits[::3], bits[1::3] = -1, 0
        logits = rng.standard_normal((rows, vocabulary + padding), np.float32)
        return {"logits": logits[:, :vocabulary], "bits": bits}

    return make


CASES = [
    Case("one", mask_logits, reference, _inputs(1, 1), writes=("logits",)),
    Case("odd", mask_logits, reference, _inputs(7, 261), writes=("logits",)),
    Case("strided", mask_logits, reference, _inputs(5, 96, padding=5), writes=("logits",)),
    Case("none", mask_logits, reference, _inputs(0, 40), writes=("logits",)),
    Case("vocabulary", mask_logits, reference, _inputs(3, 151_936), writes=("logits",), benchmark=True),
]
