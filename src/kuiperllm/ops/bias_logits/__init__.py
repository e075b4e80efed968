"""Adding to single logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract(
    "bias_logits", writes=("logits",), logits="S V", token_ids="N : int32", rows="N : int32", values="N"
)


def bias_logits(logits: Tensor, token_ids: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Add `values` to the logits of a list of (row, token) pairs, in place.

    Args:
        logits: float32 [S, V]; rows may be strided.
        token_ids: int32 [N]. No pair may occur twice; pairs outside the logits are left out.
        rows: int32 [N], the row of each pair.
        values: float32 [N]; minus infinity forbids a token.

    Returns:
        `logits`.

    Raises:
        ShapeError: the shapes contradict the contract.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(logits, token_ids, rows, values)
    implementation("bias_logits", logits.device).bias_logits(logits, token_ids, rows, values)
    return logits


def reference(
    logits: NDArray[Any], token_ids: NDArray[Any], rows: NDArray[Any], values: NDArray[Any]
) -> NDArray[Any]:
    """One pair after the other."""
    result = logits.copy()
    for token, row, value in zip(token_ids, rows, values, strict=True):
        if 0 <= row < logits.shape[0] and 0 <= token < logits.shape[1]:
            result[row, token] += value
    return result


def _inputs(rows: int, vocabulary: int, pairs: int, padding: int = 0, outside: bool = False) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        places = rng.choice(rows * vocabulary, pairs, replace=False)
        token_ids, owners = (places % vocabulary).astype(np.int32), (places // vocabulary).astype(np.int32)
        values = rng.uniform(-100, 100, pairs).astype(np.float32)
        values[::5] = -np.inf
        if outside:
            token_ids[::3], owners[1::3] = vocabulary, -1
        logits = rng.standard_normal((rows, vocabulary + padding), np.float32)
        return {"logits": logits[:, :vocabulary], "token_ids": token_ids, "rows": owners, "values": values}

    return make


CASES = [
    Case("one", bias_logits, reference, _inputs(1, 1, 1), writes=("logits",)),
    Case("none", bias_logits, reference, _inputs(2, 5, 0), writes=("logits",)),
    Case("strided", bias_logits, reference, _inputs(5, 70, 100, padding=3), writes=("logits",)),
    Case("outside", bias_logits, reference, _inputs(5, 70, 100, outside=True), writes=("logits",)),
    Case("many", bias_logits, reference, _inputs(7, 999, 3000), writes=("logits",)),
]
