"""Launches the CUDA kernel of `advance_step`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import Tensor

_ADVANCE_STEP = Kernel(Path(__file__).with_name("cuda.cu"), "advance_step")
_BLOCK = 256


def advance_step(
    tokens: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    block_size: int,
    history: Tensor,
    step: Tensor,
) -> None:
    """Advance the batch in place."""
    sequences, width = block_table.shape
    launch(
        _ADVANCE_STEP, 1, min(-(-max(sequences, 1) // 32) * 32, _BLOCK),
        tokens, input_ids, positions, seq_lens, slot_mapping, block_table, history, step,
        sequences, width, block_table.strides[0], block_size, history.shape[0], history.strides[0],
    )  # fmt: skip
