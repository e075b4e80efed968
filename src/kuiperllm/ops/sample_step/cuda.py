"""Launches the CUDA kernels of `sample_step`: those of `sample`, whose last one also advances the batch."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import launch
from kuiperllm.core import Tensor
from kuiperllm.ops.advance_step.cuda import advance_step
from kuiperllm.ops.logits import ROW_THREADS
from kuiperllm.ops.sample.cuda import DRAW_BYTES, find_cuts, kernel

_SAMPLE_STEP = kernel(Path(__file__).with_name("cuda.cu"), "sample_step")


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
    rows = logits.shape[0]
    state = input_ids, positions, seq_lens, slot_mapping, block_table
    if not rows:  # there is still a step to count
        advance_step(input_ids, *state, block_size, history, step)
        return
    params = temperature, top_k, top_p, min_p
    states, *sizes = find_cuts(logits, *params)
    launch(
        _SAMPLE_STEP, rows * sizes[-1], ROW_THREADS,
        logits, *params, seeds, states, *state, history, step, rows, *sizes,
        block_table.shape[1], block_table.strides[0], block_size, history.shape[0], history.strides[0],
        shared=DRAW_BYTES,
    )  # fmt: skip
