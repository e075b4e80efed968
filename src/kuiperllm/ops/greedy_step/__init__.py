"""The end of a decode step whose tokens are the most likely ones: `argmax` and `advance_step` in one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops import advance_step, argmax
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

_WRITES = advance_step.WRITES

CONTRACT = Contract(
    "greedy_step",
    writes=_WRITES,
    logits="S V",
    input_ids="S : int32",
    positions="S : int32",
    seq_lens="S : int32",
    slot_mapping="S : int64",
    block_table="S B : int32",
    history="R S : int32",
    step="1 : int32",
)


def greedy_step(
    logits: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    block_size: int,
    history: Tensor,
    step: Tensor,
) -> None:
    """advance_step(argmax(logits), ...); see there.

    Args:
        logits: float32 [S, V] with V at least 1; rows may be strided.
        input_ids: int32 [S]. This and all that follows is as in `advance_step`.
        positions: int32 [S], none negative.
        seq_lens: int32 [S].
        slot_mapping: int64 [S].
        block_table: int32 [S, B].
        block_size: tokens in a block.
        history: int32 [R, S] with R at least 1.
        step: int32 [1], not negative.

    Raises:
        ShapeError: the shapes do not match, V is 0, or `history` has no rows.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    sizes = CONTRACT.check(
        logits, input_ids, positions, seq_lens, slot_mapping, block_table, history, step
    )  # fmt: skip
    if sizes["V"] == 0:
        raise ShapeError(f"greedy_step: logits has shape {list(logits.shape)}: there is no token to choose")
    if sizes["R"] == 0:
        raise ShapeError("greedy_step: history has no rows")
    implementation("greedy_step", logits.device).greedy_step(
        logits, input_ids, positions, seq_lens, slot_mapping, block_table, block_size, history, step
    )


def reference(logits: NDArray[Any], **state: Any) -> tuple[NDArray[Any], ...]:
    """One after the other."""
    return advance_step.reference(argmax.reference(logits), **state)


def _inputs(sequences: int, width: int, padding: int = 0, step: int = 0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        state = advance_step.inputs(sequences, 3, 16, 4, step)(rng)
        del state["tokens"]
        return {"logits": rng.standard_normal((sequences, width + padding), np.float32)[:, :width], **state}

    return make


CASES = [
    Case("one", greedy_step, reference, _inputs(1, 1), writes=_WRITES),
    Case("none", greedy_step, reference, _inputs(0, 5), writes=_WRITES),
    Case("batch", greedy_step, reference, _inputs(37, 70, 3, step=6), writes=_WRITES),
    Case("long-rows", greedy_step, reference, _inputs(3, 50_001, step=3), writes=_WRITES),
    Case("many", greedy_step, reference, _inputs(700, 33, step=2**31 - 1), writes=_WRITES),
    Case("vocabulary", greedy_step, reference, _inputs(1, 151_936), writes=_WRITES, benchmark=True),
]
