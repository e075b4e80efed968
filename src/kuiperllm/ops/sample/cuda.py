"""Launches the CUDA kernels of `sample`."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.logits import MAX_BLOCKS, ROW_THREADS, blocks_per_row

_BINS = 2048
_CAPACITY = 4096
_SPANS = MAX_BLOCKS * ROW_THREADS // 32
_MAX_GROUPS = 512
_STATE_BYTES = 12 * MAX_BLOCKS + 12 * _BINS + 8 * _CAPACITY + 8 * _SPANS + 4 * _MAX_GROUPS + 48
"""What the kernels keep for one row: `RowState` in cuts.cuh."""

DRAW_BYTES = 8 * (_CAPACITY + _SPANS)
"""Shared memory of a kernel that draws."""


def kernel(source: Path, name: str) -> Kernel:
    """One of the kernels that know `RowState`."""
    return Kernel(source, name, MAX_BLOCKS=MAX_BLOCKS, STATE_BYTES=_STATE_BYTES)


_RANGE, _HISTOGRAM, _DRAW = (
    kernel(Path(__file__).with_name("cuda.cu"), f"sample_{name}") for name in ("range", "histogram", "draw")
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
    if logits.shape[0]:
        params = temperature, top_k, top_p, min_p
        states, *sizes = find_cuts(logits, *params)
        launch(
            _DRAW, logits.shape[0] * sizes[-1], ROW_THREADS,
            logits, *params, seeds, positions, states, out, *sizes, shared=DRAW_BYTES,
        )  # fmt: skip


def find_cuts(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, int, int, int]:
    """What precedes the draw: the states of the rows, and what follows them among its arguments: width of a
    row, its stride, blocks that share it."""
    rows, width = logits.shape
    blocks = blocks_per_row(logits.device, rows, width)
    states = Tensor.empty((rows, _STATE_BYTES // 8), DType.int64, logits.device)
    sizes = width, logits.strides[0], blocks
    launch(_RANGE, rows * blocks, ROW_THREADS, logits, states, *sizes)
    launch(_HISTOGRAM, rows * blocks, ROW_THREADS, logits, temperature, top_k, top_p, min_p, states, *sizes)
    return states, *sizes
