"""Penalties on tokens that a text already holds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract(
    "penalize",
    writes=("logits",),
    logits="S V",
    token_ids="N : int32",
    rows="N : int32",
    output_counts="N : int32",
    repetition="S",
    presence="S",
    frequency="S",
)


def penalize(
    logits: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Apply the penalties of `SamplingParams` to a list of (row, token) pairs, in place.

    The logit of each pair is first divided by the row's repetition penalty if it is positive, and multiplied
    by it otherwise (Keskar et al. 2019, arXiv:1909.05858). Then, if the token was generated c > 0 times,
    presence + c * frequency is subtracted.

    Args:
        logits: float32 [S, V].
        token_ids: int32 [N], tokens seen in the prompt or the output of a row. No pair may occur twice; pairs
            outside the logits are left out, so that a list can be longer than what it holds.
        rows: int32 [N], the row of each pair.
        output_counts: int32 [N], how often the token was generated; 0: it was only in the prompt.
        repetition: float32 [S], 1 for none.
        presence: float32 [S], 0 for none.
        frequency: float32 [S], 0 for none.

    Returns:
        `logits`.

    Raises:
        ShapeError: the shapes contradict the contract.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(logits, token_ids, rows, output_counts, repetition, presence, frequency)
    implementation("penalize", logits.device).penalize(
        logits, token_ids, rows, output_counts, repetition, presence, frequency
    )
    return logits


def reference(
    logits: NDArray[Any],
    token_ids: NDArray[Any],
    rows: NDArray[Any],
    output_counts: NDArray[Any],
    repetition: NDArray[Any],
    presence: NDArray[Any],
    frequency: NDArray[Any],
) -> NDArray[Any]:
    """One pair after the other, in float64."""
    result = logits.copy()
    for token, row, count in zip(token_ids, rows, output_counts, strict=True):
        if not (0 <= row < logits.shape[0] and 0 <= token < logits.shape[1]):
            continue
        value = float(logits[row, token])
        value = value / repetition[row] if value > 0 else value * repetition[row]
        if count > 0:
            value -= presence[row] + count * frequency[row]
        result[row, token] = value
    return result


def _inputs(rows: int, vocabulary: int, pairs: int, padding: int = 0, outside: bool = False) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        places = rng.choice(rows * vocabulary, pairs, replace=False)
        token_ids, owners = (places % vocabulary).astype(np.int32), (places // vocabulary).astype(np.int32)
        if outside:
            token_ids[::3], owners[1::3] = -1, rows
        logits = rng.standard_normal((rows, vocabulary + padding), np.float32) * np.float32(5)
        return {
            "logits": logits[:, :vocabulary],
            "token_ids": token_ids,
            "rows": owners,
            "output_counts": rng.integers(0, 4, pairs, np.int32),
            "repetition": rng.uniform(0.5, 2, rows).astype(np.float32),
            "presence": rng.uniform(-2, 2, rows).astype(np.float32),
            "frequency": rng.uniform(-2, 2, rows).astype(np.float32),
        }

    return make


CASES = [
    Case("one", penalize, reference, _inputs(1, 1, 1), writes=("logits",)),
    Case("none", penalize, reference, _inputs(2, 5, 0), writes=("logits",)),
    Case("strided", penalize, reference, _inputs(5, 70, 100, padding=3), writes=("logits",)),
    Case("outside", penalize, reference, _inputs(5, 70, 100, outside=True), writes=("logits",)),
    Case("vocabulary", penalize, reference, _inputs(4, 32_000, 4000), writes=("logits",), benchmark=True),
]
