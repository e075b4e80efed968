"""How fast this machine reads memory: what the speed of decoding is held against."""

from __future__ import annotations

import time
from statistics import median

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import DType, Tensor

_PART_BYTES = 4 << 20
_READ = Kernel("kuiperllm.backends.cpu.bandwidth_kernel", "read_memory")


def read_bandwidth(nbytes: int = 1 << 30, rounds: int = 7) -> float:
    """Bytes per second that all threads together read from memory; the median of some rounds.

    Raises:
        OutOfMemoryError: there are not `nbytes` to spare.
    """
    parts = max(1, nbytes // _PART_BYTES)
    memory = Tensor.zeros((parts * _PART_BYTES,), DType.uint8)
    sums = Tensor.zeros((parts,), DType.int32)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        launch(_READ, memory, sums, _PART_BYTES, items=parts)
        times.append(time.perf_counter() - started)
    return parts * _PART_BYTES / median(times[1:])
