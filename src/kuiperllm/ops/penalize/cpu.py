"""Launches the CPU kernel of `penalize`: one work item for each pair."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor

_PENALIZE = Kernel("kuiperllm.ops.penalize.cpu_kernel", "penalize")
_GRAIN = 1024


def penalize(
    logits: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Change the logits [S, V] of the pairs in place."""
    sequences, vocabulary = logits.shape
    launch(
        _PENALIZE, logits, token_ids, rows, output_counts, repetition, presence, frequency,
        sequences, vocabulary, logits.strides[0],
        items=token_ids.shape[0], grain=_GRAIN,
    )  # fmt: skip
