"""How much memory of the caching pool nobody asked for."""

from __future__ import annotations

from collections.abc import Iterable

from kuiperllm.core import Allocator, Device
from kuiperllm.core.memory import MemoryInfo, MemorySource


class Numbers(MemorySource):
    """Addresses without memory behind them, as many as are asked for.

    Args:
        granularity: what reservations are rounded up to, a power of two.
    """

    def __init__(self, granularity: int) -> None:
        self.granularity = granularity
        self._next = 1 << 40

    def reserve(self, nbytes: int) -> int:
        """The next address."""
        address, self._next = self._next, self._next + nbytes
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Nothing was taken, so nothing is given back."""

    def info(self) -> MemoryInfo:
        """More than anybody needs."""
        return MemoryInfo(1 << 60, 1 << 60)


def waste(sizes: Iterable[int], granularity: int = 4096) -> float:
    """The part of the memory set aside for requests of these sizes that they do not use, from 0 to 1.

    Args:
        sizes: bytes of each request; all are in use at the same time.
        granularity: that of the memory source.
    """
    pool = Allocator(Numbers(granularity), Device("cpu"))
    buffers = [pool.allocate(size) for size in sizes]
    taken = pool.stats().allocated_bytes
    return 1 - sum(buffer.nbytes for buffer in buffers) / taken


def worst_size(first: int = 512, last: int = 1 << 20) -> tuple[int, float]:
    """The size for which most is set aside beyond the request, and how much that is of the request.

    It is the first byte of a class: only those have to be tried.
    """
    candidates = []
    size = first
    while size <= last:
        taken = size / (1 - waste([size]))
        candidates.append((taken / size - 1, size))
        size = round(taken) + 1
    over, size = max(candidates)
    return size, over
