"""Launches the CUDA kernels of `softmax`: several blocks share a row, in two passes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.backends.cuda.rows import grid, vector_width
from kuiperllm.core import DType, Tensor

_SOURCE = Path(__file__).with_name("cuda.cu")
_BLOCK = 256
_ELEMENTS = 16  # that a thread holds


def softmax(x: Tensor, out: Tensor) -> None:
    """Rows of x [T, V] to rows of out."""
    if not x.numel:
        return
    rows, width = x.shape
    step = vector_width(width, DType.float32, x, out)
    blocks = grid(-(-width // _ELEMENTS), rows, _BLOCK)
    parts = Tensor.empty((rows, blocks[0], 2), DType.float32, x.device)
    launch(_kernel("softmax_parts", step), blocks, _BLOCK, x, parts, rows, width, x.strides[0])
    launch(
        _kernel("softmax", step), blocks, _BLOCK, x, parts, out, rows, width, x.strides[0], out.strides[0]
    )  # fmt: skip


@cache
def _kernel(name: str, step: int) -> Kernel:
    return Kernel(_SOURCE, name, WIDTH=step)
