"""Launches the CPU kernel of `mask_logits`."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor

_MASK_LOGITS = Kernel("kuiperllm.ops.mask_logits.cpu_kernel", "mask_logits")


def mask_logits(logits: Tensor, bits: Tensor) -> None:
    """One work item for each row."""
    (rows, vocabulary), strides = logits.shape, (logits.strides[0], bits.strides[0])
    launch(_MASK_LOGITS, logits, bits, vocabulary, *strides, items=rows)
