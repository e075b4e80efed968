"""Launches the CUDA kernel of `bias_logits`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import Tensor

_BIAS_LOGITS = Kernel(Path(__file__).with_name("cuda.cu"), "bias_logits")
_BLOCK = 256


def bias_logits(logits: Tensor, token_ids: Tensor, rows: Tensor, values: Tensor) -> None:
    """A thread for each pair."""
    pairs = token_ids.shape[0]
    launch(
        _BIAS_LOGITS, -(-pairs // _BLOCK), _BLOCK,
        logits, token_ids, rows, values, pairs, *logits.shape, logits.strides[0],
    )  # fmt: skip
