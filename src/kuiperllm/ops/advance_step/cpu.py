"""Launches the CPU kernel of `advance_step`."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor

_ADVANCE_STEP = Kernel("kuiperllm.ops.advance_step.cpu_kernel", "advance_step")


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
    """One work item: there is next to nothing to do."""
    sequences, width = block_table.shape
    launch(
        _ADVANCE_STEP, tokens, input_ids, positions, seq_lens, slot_mapping, block_table, history, step,
        sequences, width, block_table.strides[0], block_size, *history.shape[:1], history.strides[0],
        items=1,
    )  # fmt: skip
