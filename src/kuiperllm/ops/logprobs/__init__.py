"""How likely tokens were."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import DType, Tensor
from kuiperllm.errors import UsageError
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("logprobs", logits="S V", token_ids="S : int32")


def logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of probabilities: logit - log(sum of e**logit), of some tokens of each row.

    Args:
        logits: float32 [S, V]; rows may be strided.
        token_ids: int32 [S], the token of each row to report; minus infinity is reported for one outside V.
        k: how many of the most likely tokens to report as well, 0 to V.

    Returns:
        The log probability of `token_ids`, float32 [S]; the k most likely tokens, most likely first and of
        equal ones the lower first, int32 [S, k]; and their log probabilities, float32 [S, k]. Where fewer
        than k logits are numbers above minus infinity, the rest is token -1 with minus infinity. A row that
        holds NaN has log probabilities NaN.

    Raises:
        UsageError: k is not 0 to V.
        ShapeError: the shapes contradict the contract.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    sizes = CONTRACT.check(logits, token_ids)
    if not 0 <= k <= sizes["V"]:
        raise UsageError(f"logprobs: k={k} is not possible; allowed: 0 to {sizes['V']}, the vocabulary")
    chosen = Tensor.empty(token_ids.shape, DType.float32, logits.device)
    top_ids = Tensor.empty((sizes["S"], k), DType.int32, logits.device)
    top_values = Tensor.empty((sizes["S"], k), DType.float32, logits.device)
    implementation("logprobs", logits.device).logprobs(logits, token_ids, chosen, top_ids, top_values)
    return chosen, top_ids, top_values


def reference(
    logits: NDArray[Any], token_ids: NDArray[Any], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """By sorting, in float64."""
    wide = logits.astype(np.float64)
    best = wide.max(axis=1, keepdims=True)
    logs = wide - best - np.log(np.exp(wide - best).sum(axis=1, keepdims=True))
    inside = (token_ids >= 0) & (token_ids < logits.shape[1])
    picked = np.take_along_axis(logs, np.where(inside, token_ids, 0)[:, None], axis=1)[:, 0]
    top = np.argsort(-wide, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(logs, top, axis=1)
    return (
        np.where(inside, picked, -np.inf).astype(np.float32),
        np.where(np.isneginf(values), -1, top).astype(np.int32),
        values.astype(np.float32),
    )


def _inputs(rows: int, vocabulary: int, k: int, values: int = 0, masked: int = 0) -> Any:
    """`values`: how many different logits; `masked`: how many of each row are minus infinity."""

    def make(rng: np.random.Generator) -> dict[str, Any]:
        logits = rng.standard_normal((rows, vocabulary + 1), np.float32) * np.float32(4)
        if values:
            logits = rng.integers(0, values, logits.shape).astype(np.float32)
        logits[:, :masked] = -np.inf
        return {
            "logits": logits[:, :vocabulary],
            "token_ids": rng.integers(-1, vocabulary + 1, rows, np.int32),
            "k": k,
        }

    return make


CASES = [
    Case("one", logprobs, reference, _inputs(1, 1, 1)),
    Case("no-top", logprobs, reference, _inputs(20, 37, 0)),
    Case("top", logprobs, reference, _inputs(20, 70, 5)),
    Case("ties", logprobs, reference, _inputs(20, 70, 12, values=3)),
    Case("all", logprobs, reference, _inputs(5, 40, 40)),
    Case("masked", logprobs, reference, _inputs(5, 40, 20, masked=30)),
    Case("long-rows", logprobs, reference, _inputs(2, 5003, 30), rtol=1e-5),
    Case("thousands", logprobs, reference, _inputs(1, 5003, 3000, masked=2100), rtol=1e-5),
    Case("vocabulary", logprobs, reference, _inputs(1, 151_936, 20), rtol=1e-5, benchmark=True),
]
