"""The host's memory, reserved as anonymous memory maps so that what is released goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from kuiperllm.backends.cpu.meminfo import anonymous_bytes, memory_info
from kuiperllm.core.memory import MemoryInfo, MemorySource, out_of_memory

HUGE_PAGE_BYTES = 2 << 20
"""The page size that large reservations are aligned to and ask for."""

HUGE_FROM_BYTES = 4 << 20
"""Reservations from this size on ask for huge pages."""


class HostMemory(MemorySource):
    """Anonymous private memory maps, page-aligned; large ones on huge pages where the system grants them.

    Args:
        info: tells how much memory is free; tests pass their own to set a limit.
        touched: tells how much anonymous memory the process really occupies.
    """

    alignment = 64
    granularity = mmap.PAGESIZE

    def __init__(
        self, info: Callable[[], MemoryInfo] = memory_info, touched: Callable[[], int] = anonymous_bytes
    ) -> None:
        self._info = info
        self._touched = touched
        self._maps: dict[int, mmap.mmap] = {}
        self._reserved = 0

    def reserve(self, nbytes: int) -> int:
        """Map `nbytes` bytes; nothing is touched yet, so pages cost memory only once they are used.

        Raises:
            OutOfMemoryError: less than that is free, by `info` or by the system's own word.
        """
        info = self.info()
        if nbytes > info.free_bytes:
            raise out_of_memory("cpu", nbytes, info)
        huge = nbytes >= HUGE_FROM_BYTES
        # A map starts on a small page: ask for one huge page more and begin at its boundary.
        length = nbytes + HUGE_PAGE_BYTES if huge else nbytes
        try:
            pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            raise out_of_memory("cpu", nbytes, info) from None
        address = base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        if huge:
            address = (base + HUGE_PAGE_BYTES - 1) & -HUGE_PAGE_BYTES
            _ask_for_huge_pages(pages, address - base, nbytes)
        self._maps[address] = pages
        self._reserved += nbytes
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Unmap what `reserve` mapped at `address`."""
        self._maps.pop(address).close()
        self._reserved -= nbytes

    def info(self) -> MemoryInfo:
        """The memory that this process may still take, and all it could ever have.

        The system counts a page as used once it is touched; what is reserved but untouched comes off here.
        """
        free, total = self._info()
        untouched = max(self._reserved - self._touched(), 0)
        return MemoryInfo(max(free - untouched, 0), total)


def _ask_for_huge_pages(pages: mmap.mmap, start: int, nbytes: int) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return
    try:
        pages.madvise(advice, start, nbytes)
    except OSError:
        # A kernel built without transparent huge pages refuses; small pages work as well, only slower.
        return
