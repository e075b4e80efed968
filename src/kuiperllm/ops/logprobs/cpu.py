"""Launches the CPU kernel of `logprobs`: one work item for each row."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor

_LOGPROBS = Kernel("kuiperllm.ops.logprobs.cpu_kernel", "logprobs")


def logprobs(logits: Tensor, token_ids: Tensor, chosen: Tensor, top_ids: Tensor, top_values: Tensor) -> None:
    """Log probabilities of rows of logits [S, V] to chosen [S] and top_values [S, k]."""
    rows, vocabulary = logits.shape
    launch(
        _LOGPROBS, logits, token_ids, chosen, top_ids, top_values,
        vocabulary, logits.strides[0], top_ids.shape[1],
        items=rows, grain=1,
    )  # fmt: skip
