"""Launches the CUDA kernel of `argmax`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.logits import ROW_THREADS, blocks_per_row

_ARGMAX = Kernel(Path(__file__).with_name("cuda.cu"), "argmax")


def argmax(x: Tensor, out: Tensor) -> None:
    """Of each row of x [T, V], the index of the largest element to out [T]."""
    rows, width = x.shape
    if not rows:
        return
    blocks = blocks_per_row(x.device, rows, width)
    winners = Tensor.empty(rows * blocks, DType.int64, x.device)
    launch(_ARGMAX, rows * blocks, ROW_THREADS, x, winners, out, rows, width, x.strides[0], blocks)
