"""How fast kernels read a GPU's memory, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.backends.cuda.launch import launch
from kuiperllm.core.dtype import DType
from kuiperllm.core.tensor import Tensor

if TYPE_CHECKING:
    from kuiperllm.backends.cuda.backend import CudaBackend
    from kuiperllm.backends.cuda.driver import Chip

_READ = Kernel(Path(__file__).with_name("bandwidth.cu"), "read_all")
_THREADS = 512
_VECTOR_BYTES = 16
_MAX_BYTES = 4 << 30
_BLOCKS_PER_MULTIPROCESSOR = (1, 2, 3, 4)
_REPEATS = 5


def kernels(chip: Chip) -> list[Kernel]:
    """The kernels of this module, for tests that compile them."""
    return [_READ]


def read_bandwidth(backend: CudaBackend, max_bytes: int = _MAX_BYTES) -> float:
    """Bytes per second of the fastest of some launches, each reading the same few gigabytes.

    Args:
        backend: the GPU.
        max_bytes: what is read at a time; at most half of the memory that is free.

    Raises:
        OutOfMemoryError: not even that is left.
    """
    nbytes = min(max_bytes, backend.source.info().free_bytes // 2) & -_VECTOR_BYTES
    data = Tensor.zeros((nbytes,), DType.uint8, backend.device)
    sink = Tensor.empty((1,), DType.int32, backend.device)
    best_ms = float("inf")
    for blocks in _BLOCKS_PER_MULTIPROCESSOR:
        grid = blocks * backend.driver.chip.multiprocessors
        for _ in range(_REPEATS):
            start = backend.record(timing=True)
            launch(_READ, grid, _THREADS, data, nbytes // _VECTOR_BYTES, sink)
            best_ms = min(best_ms, backend.record(timing=True).ms_since(start))
    del data
    backend.device.allocator.empty_cache()
    return nbytes / (best_ms / 1000)
