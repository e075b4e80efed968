"""`sample_step` on the CPU: the plain operators."""

from __future__ import annotations

from kuiperllm.core import DType, Tensor
from kuiperllm.ops.advance_step.cpu import advance_step
from kuiperllm.ops.sample.cpu import sample


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
    """Draw a token for each row of logits [S, V] and advance the batch in place."""
    tokens = Tensor.empty(logits.shape[:1], DType.int32)
    sample(logits, temperature, top_k, top_p, min_p, seeds, seq_lens, tokens)
    advance_step(
        tokens, input_ids, positions, seq_lens, slot_mapping, block_table, block_size, history, step
    )  # fmt: skip
