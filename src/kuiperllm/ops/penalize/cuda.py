"""Launches the CUDA kernel of `penalize`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import Tensor

_PENALIZE = Kernel(Path(__file__).with_name("cuda.cu"), "penalize")
_BLOCK = 256


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
    pairs, (sequences, vocabulary) = token_ids.shape[0], logits.shape
    launch(
        _PENALIZE, -(-pairs // _BLOCK), _BLOCK,
        logits, token_ids, rows, output_counts, repetition, presence, frequency,
        pairs, sequences, vocabulary, logits.strides[0],
    )  # fmt: skip
