"""Launches the CUDA kernel of `mask_logits`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import Tensor

_MASK_LOGITS = Kernel(Path(__file__).with_name("cuda.cu"), "mask_logits")
_BLOCK = 256
_MOST_ROWS = 65_535  # blocks along y; each takes every so manieth row


def mask_logits(logits: Tensor, bits: Tensor) -> None:
    """A thread for each token of a row, so that 32 neighbours read one word."""
    rows, vocabulary = logits.shape
    launch(
        _MASK_LOGITS, (-(-vocabulary // _BLOCK), min(rows, _MOST_ROWS)), _BLOCK,
        logits, bits, rows, vocabulary, logits.strides[0], bits.strides[0],
    )  # fmt: skip
