"""Launches the CUDA kernels of `sample`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.logits import MAX_BLOCKS, ROW_THREADS, blocks_per_row

_BINS = 2048
_CAPACITY = 4096
_STATE_BYTES = 12 * MAX_BLOCKS + 12 * _BINS + 8 * _CAPACITY + MAX_BLOCKS * ROW_THREADS // 4 + 40
"""What the kernels keep for one row: `RowState` in cuda.cu."""

_RANGE, _HISTOGRAM, _CANDIDATES, _DRAW = (
    Kernel(Path(__file__).with_name("cuda.cu"), name, MAX_BLOCKS=MAX_BLOCKS, STATE_BYTES=_STATE_BYTES)
    for name in ("sample_range", "sample_histogram", "sample_candidates", "sample_draw")
)


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
    rows, width = logits.shape
    if not rows:
        return
    blocks = blocks_per_row(logits.device, rows, width)
    states = Tensor.empty((rows, _STATE_BYTES // 8), DType.int64, logits.device)
    grid, params = rows * blocks, (temperature, top_k, top_p, min_p)
    sizes = width, logits.strides[0], blocks
    launch(_RANGE, grid, ROW_THREADS, logits, states, *sizes)
    launch(_HISTOGRAM, grid, ROW_THREADS, logits, *params, states, *sizes)
    launch(_CANDIDATES, grid, ROW_THREADS, logits, *params, states, *sizes)
    launch(_DRAW, grid, ROW_THREADS, logits, *params, seeds, positions, states, out, *sizes)
