"""How CUDA launchers divide rows of logits into blocks; see `logits.cuh`."""

from __future__ import annotations

from kuiperllm.backends.cuda.launch import chip
from kuiperllm.core import Device

ROW_THREADS = 512
MAX_BLOCKS = 128

_BLOCK_ELEMENTS = 4 * ROW_THREADS  # a vector for each thread
_BLOCKS_PER_MULTIPROCESSOR = 2


def row_vectors(width: int) -> int:
    """How many vectors of four elements a row of `width` can touch, wherever it begins."""
    return (width + 6) // 4


def blocks_per_row(device: Device, rows: int, width: int) -> int:
    """How many blocks should share a row: enough to fill the GPU, each thread with a vector or more."""
    room = _BLOCKS_PER_MULTIPROCESSOR * chip(device).multiprocessors // max(rows, 1)
    return max(1, min(-(-4 * row_vectors(width) // _BLOCK_ELEMENTS), room, MAX_BLOCKS))
