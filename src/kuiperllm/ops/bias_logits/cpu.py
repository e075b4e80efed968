"""Launches the CPU kernel of `bias_logits`."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor

_BIAS_LOGITS = Kernel("kuiperllm.ops.bias_logits.cpu_kernel", "bias_logits")


def bias_logits(logits: Tensor, token_ids: Tensor, rows: Tensor, values: Tensor) -> None:
    """One work item for each pair, a good many at a time."""
    launch(
        _BIAS_LOGITS, logits, token_ids, rows, values, *logits.shape, logits.strides[0],
        items=token_ids.shape[0], grain=1024,
    )  # fmt: skip
