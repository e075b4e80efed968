"""Launches the CPU kernel of `pick_tokens`."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor

_PICK_TOKENS = Kernel("kuiperllm.ops.pick_tokens.cpu_kernel", "pick_tokens")


def pick_tokens(given: Tensor, source: Tensor, newest: Tensor, out: Tensor) -> None:
    """One work item for each token, a good many at a time."""
    launch(_PICK_TOKENS, given, source, newest, out, items=given.shape[0], grain=4096)
