"""Launches the CUDA kernel of `greedy_step`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.logits import ROW_THREADS, blocks_per_row

_GREEDY_STEP = Kernel(Path(__file__).with_name("cuda.cu"), "greedy_step")


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
    sequences, vocabulary = logits.shape
    if not sequences:
        vocabulary = 0  # one block, which has nothing to read, counts the step
    blocks = blocks_per_row(logits.device, sequences, vocabulary)
    grid = max(sequences, 1) * blocks
    winners = Tensor.empty(grid, DType.int64, logits.device)
    launch(
        _GREEDY_STEP, grid, ROW_THREADS,
        logits, winners, input_ids, positions, seq_lens, slot_mapping, block_table, history, step,
        sequences, vocabulary, logits.strides[0], blocks,
        block_table.shape[1], block_table.strides[0], block_size, history.shape[0], history.strides[0],
    )  # fmt: skip
