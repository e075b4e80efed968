"""Launches the CUDA kernel of `rope`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.backends.cuda.rows import grid, vector_width
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.contract import ACTIVATIONS

DTYPES = ACTIVATIONS

_SOURCE = Path(__file__).with_name("cuda.cu")
_BLOCK = 128


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """Turn the heads of x [T, H, d] in place."""
    num_positions = cos_sin.shape[0]
    if not x.numel or not num_positions:
        return
    tokens, heads, width = x.shape
    half = width // 2
    step = vector_width(width if interleaved else half, x.dtype, x, cos_sin)
    pairs = max(1, step // 2) if interleaved else step
    launch(
        _kernel(x.dtype, pairs, interleaved), grid(heads * (half // pairs), tokens, _BLOCK), _BLOCK,
        x, positions, cos_sin, tokens, heads, half, num_positions,
        x.strides[0], x.strides[1], cos_sin.strides[0],
    )  # fmt: skip


@cache
def _kernel(dtype: DType, pairs: int, interleaved: bool) -> Kernel:
    return Kernel(_SOURCE, "rope", T=dtype, PAIRS=pairs, INTERLEAVED=interleaved)
