"""The end of a decode step whose tokens are drawn: `sample` and `advance_step` in one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops import advance_step, sample
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

_WRITES = advance_step.WRITES

CONTRACT = Contract(
    "sample_step",
    writes=_WRITES,
    logits="S V",
    temperature="S",
    top_k="S : int32",
    top_p="S",
    min_p="S",
    seeds="S : int64",
    input_ids="S : int32",
    positions="S : int32",
    seq_lens="S : int32",
    slot_mapping="S : int64",
    block_table="S B : int32",
    history="R S : int32",
    step="1 : int32",
)


def sample_step(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    block_size: int,
    history: Tensor,
    step: Tensor,
) -> None:
    """advance_step(sample(logits, ..., seeds, seq_lens), ...).

    The length of a sequence, this step's token included, is where the new token will stand.

    Args:
        logits: float32 [S, V] with V at least 1; rows may be strided. This and what follows: see `sample`.
        temperature: float32 [S].
        top_k: int32 [S].
        top_p: float32 [S].
        min_p: float32 [S].
        seeds: int64 [S], read as 64 bits without a sign.
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
        logits, temperature, top_k, top_p, min_p, seeds, input_ids, positions, seq_lens, slot_mapping,
        block_table, history, step,
    )  # fmt: skip
    if sizes["V"] == 0:
        raise ShapeError(f"sample_step: logits has shape {list(logits.shape)}: there is no token to draw")
    if sizes["R"] == 0:
        raise ShapeError("sample_step: history has no rows")
    implementation("sample_step", logits.device).sample_step(
        logits, temperature, top_k, top_p, min_p, seeds, input_ids, positions, seq_lens, slot_mapping,
        block_table, block_size, history, step,
    )  # fmt: skip


def reference(
    logits: NDArray[Any],
    temperature: NDArray[Any],
    top_k: NDArray[Any],
    top_p: NDArray[Any],
    min_p: NDArray[Any],
    seeds: NDArray[Any],
    **state: Any,
) -> tuple[NDArray[Any], ...]:
    """One after the other."""
    tokens = sample.reference(logits, temperature, top_k, top_p, min_p, seeds, state["seq_lens"])
    return advance_step.reference(tokens, **state)


def _inputs(sequences: int, width: int, padding: int = 0, step: int = 0) -> Any:
    """Every third row takes the most likely token, every third one has no cut."""

    def make(rng: np.random.Generator) -> dict[str, Any]:
        state = advance_step.inputs(sequences, 3, 16, 4, step)(rng)
        del state["tokens"]
        logits = rng.standard_normal((sequences, width + padding), np.float32) * np.float32(3)
        kind = np.arange(sequences) % 3
        return {
            "logits": logits[:, :width],
            "temperature": np.where(kind == 2, 0.0, 0.7).astype(np.float32),
            "top_k": np.where(kind == 0, 20, 0).astype(np.int32),
            "top_p": np.where(kind == 0, 0.8, 1.0).astype(np.float32),
            "min_p": np.zeros(sequences, np.float32),
            "seeds": rng.integers(-(2**63), 2**63, sequences, np.int64),
            **state,
        }

    return make


CASES = [
    Case("one", sample_step, reference, _inputs(1, 1), writes=_WRITES),
    Case("none", sample_step, reference, _inputs(0, 5), writes=_WRITES),
    Case("batch", sample_step, reference, _inputs(37, 70, 3, step=6), writes=_WRITES),
    Case("long-rows", sample_step, reference, _inputs(3, 50_001, step=3), writes=_WRITES),
    Case("many", sample_step, reference, _inputs(400, 33, step=2**31 - 1), writes=_WRITES),
    Case("vocabulary", sample_step, reference, _inputs(1, 151_936), writes=_WRITES, benchmark=True),
]
