"""Launches the CPU kernel of `sample`: one work item for each row."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor

_SAMPLE = Kernel("kuiperllm.ops.sample.cpu_kernel", "sample")
_LIST = 4096
"""Once no more tokens than this can remain, the kernel goes on with a list of them."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    """Tokens for the rows of logits [S, V] to out [S]."""
    rows, vocabulary = logits.shape
    padded = (vocabulary + 15) & -16
    scratch = Tensor.empty((rows, padded + 3 * _LIST))
    launch(
        _SAMPLE, logits, temperature, top_k, top_p, min_p, seeds, positions, out, scratch,
        vocabulary, logits.strides[0], padded, _LIST,
        items=rows, grain=1,
    )  # fmt: skip
