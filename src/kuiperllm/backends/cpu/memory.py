"""The host's memory, reserved as anonymous memory maps so that what is released goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from kuiperllm.backends.cpu.meminfo import anonymous_bytes, memory_info
from kuiperllm.core.memory import MemoryInfo, MemorySource, out_of_memory

HUGE_PAGE_BYTES = 2 << 20
"""The page size that large reservations are aligned to and ask for."""

HUGE_FROM_BYTES = 1 << 20
"""Reservations from this size on ask for huge pages."""

ARENA_BYTES = 64 << 20
"""Address space that reservations of up to a quarter of it lie in, one behind the other: else the end of each
would be left to small pages."""


class _Pages:
    """A memory map that begins at the boundary of a huge page and asks for such pages.

    Raises:
        OSError: the system has no room for it.
    """

    def __init__(self, nbytes: int) -> None:
        # A map starts on a small page: ask for one huge page more and begin at its boundary.
        self._map = _anonymous(nbytes + HUGE_PAGE_BYTES)
        base = _address(self._map)
        self.address = (base + HUGE_PAGE_BYTES - 1) & -HUGE_PAGE_BYTES
        self.size = nbytes
        self.used = 0
        self.pieces = 0
        self._skipped = self.address - base
        self._advise("MADV_HUGEPAGE", 0, nbytes)

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes, whole small pages, are left."""
        return nbytes <= self.size - self.used

    def take(self, nbytes: int) -> int:
        """The address of the next `nbytes` bytes."""
        self.used += nbytes
        self.pieces += 1
        return self.address + self.used - nbytes

    def give_back(self, address: int, nbytes: int) -> None:
        """Let the system have the memory of a piece; its addresses stay taken until the last piece goes."""
        self.pieces -= 1
        if self.pieces:
            self._advise("MADV_DONTNEED", address - self.address, nbytes)
        else:
            self._map.close()

    def _advise(self, name: str, start: int, nbytes: int) -> None:
        advice = getattr(mmap, name, None)
        if advice is None:
            return
        try:
            self._map.madvise(advice, self._skipped + start, nbytes)
        except OSError:
            # A kernel built without transparent huge pages refuses; small pages work as well, only slower.
            return


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
        self._pieces: dict[int, _Pages] = {}
        self._arena: _Pages | None = None
        self._reserved = 0

    def reserve(self, nbytes: int) -> int:
        """Map `nbytes` bytes; nothing is touched yet, so pages cost memory only once they are used.

        Raises:
            OutOfMemoryError: less than that is free, by `info` or by the system's own word.
        """
        info = self.info()
        if nbytes > info.free_bytes:
            raise out_of_memory("cpu", nbytes, info)
        try:
            address = self._huge(nbytes) if nbytes >= HUGE_FROM_BYTES else self._small(nbytes)
        except OSError:
            raise out_of_memory("cpu", nbytes, info) from None
        self._reserved += nbytes
        return address

    def _small(self, nbytes: int) -> int:
        pages = _anonymous(nbytes)
        address = _address(pages)
        self._maps[address] = pages
        return address

    def _huge(self, nbytes: int) -> int:
        size = _whole_pages(nbytes)
        if size > ARENA_BYTES // 4:
            pages = _Pages(size)
        elif self._arena is not None and self._arena.has_room(size):
            pages = self._arena
        else:
            self._arena = pages = _Pages(ARENA_BYTES)
        address = pages.take(size)
        self._pieces[address] = pages
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Give back what `reserve` found at `address`."""
        self._reserved -= nbytes
        if address in self._maps:
            self._maps.pop(address).close()
            return
        pages = self._pieces.pop(address)
        pages.give_back(address, _whole_pages(nbytes))
        if pages is self._arena and not pages.pieces:
            self._arena = None

    def info(self) -> MemoryInfo:
        """The memory that this process may still take, and all it could ever have.

        The system counts a page as used once it is touched; what is reserved but untouched comes off here.
        """
        free, total = self._info()
        untouched = max(self._reserved - self._touched(), 0)
        return MemoryInfo(max(free - untouched, 0), total)


def _anonymous(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _address(pages: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(pages))


def _whole_pages(nbytes: int) -> int:
    return (nbytes + mmap.PAGESIZE - 1) & -mmap.PAGESIZE
