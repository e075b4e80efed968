"""`greedy_step` on the CPU: the plain operators."""

from __future__ import annotations

from kuiperllm.core import DType, Tensor
from kuiperllm.ops.advance_step.cpu import advance_step
from kuiperllm.ops.argmax.cpu import argmax


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
    """Choose a token for each row of logits [S, V] and advance the batch in place."""
    tokens = Tensor.empty(logits.shape[:1], DType.int32)
    argmax(logits, tokens)
    advance_step(
        tokens, input_ids, positions, seq_lens, slot_mapping, block_table, block_size, history, step
    )  # fmt: skip
