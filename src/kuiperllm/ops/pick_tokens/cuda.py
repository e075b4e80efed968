"""Launches the CUDA kernel of `pick_tokens`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import Tensor

_PICK_TOKENS = Kernel(Path(__file__).with_name("cuda.cu"), "pick_tokens")
_BLOCK = 256


def pick_tokens(given: Tensor, source: Tensor, newest: Tensor, out: Tensor) -> None:
    """A thread for each token."""
    tokens = given.shape[0]
    launch(_PICK_TOKENS, -(-tokens // _BLOCK), _BLOCK, given, source, newest, out, tokens)
