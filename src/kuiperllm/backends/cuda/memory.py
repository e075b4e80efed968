"""A GPU's memory, and page-locked memory of the host that the GPU copies to and from."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from kuiperllm.backends.cuda.driver import Driver
from kuiperllm.core.memory import MemoryInfo, MemorySource

SMALL_COPY_BYTES = 256 << 10
"""Copies up to this size are cheap rather than fast."""

_SMALL_PIECE_BYTES, _SMALL_PIECES = 1 << 20, 4
_LARGE_PIECE_BYTES, _LARGE_PIECES = 4 << 20, 16
_MAX_FILLERS = 8


class DeviceMemory(MemorySource):
    """The memory of one GPU."""

    alignment = 512
    granularity = 2 << 20

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._reserved: dict[int, int] = {}

    def reserve(self, nbytes: int) -> int:
        """Reserve device memory.

        Raises:
            OutOfMemoryError: there is not that much left.
        """
        self._driver.activate()
        address = self._driver.allocate(nbytes)
        self._reserved[address] = nbytes
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Give memory back, once all queued work is done."""
        self._driver.activate()
        del self._reserved[address]
        self._driver.free(address)

    def info(self) -> MemoryInfo:
        """The free and the total memory of the GPU, other processes' use counted."""
        self._driver.activate()
        return MemoryInfo(*self._driver.memory_info())

    def owns(self, address: int) -> bool:
        """Whether an address lies in what was reserved here."""
        return any(start <= address < start + size for start, size in list(self._reserved.items()))


class PinnedBlock:
    """Page-locked host memory, given back when nothing refers to it any more.

    A kernel may still be writing to it by then, and a finalizer must not wait: it leaves the address where
    the back end will look.
    """

    __slots__ = ("_retired", "address")

    def __init__(self, address: int, retired: deque[int]) -> None:
        self.address = address
        self._retired = retired

    def __del__(self) -> None:
        self._retired.append(self.address)


# --- staging ----------------------------------------------------------------------------------------------


class _Piece:
    """A part of a ring: its memory, how much of it is taken, and the mark behind the copies that use it."""

    __slots__ = ("address", "event", "is_pending", "unloading", "used")

    def __init__(self, address: int, event: int) -> None:
        self.address = address
        self.event = event
        self.used = 0
        self.is_pending = False
        self.unloading: Future[int] | None = None


class _Ring:
    """Pieces of page-locked memory, used in turn; each again once the copies that use it are done."""

    def __init__(self, driver: Driver, piece_bytes: int, num_pieces: int) -> None:
        base = driver.allocate_host(piece_bytes * num_pieces)
        self.piece_bytes = piece_bytes
        self._driver = driver
        self._pieces = [_Piece(base + i * piece_bytes, driver.create_event()) for i in range(num_pieces)]
        self._index = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def take(self, nbytes: int, stream: int) -> int:
        """Address of `nbytes` bytes for a copy that is queued before the next call."""
        piece = self._pieces[self._index]
        if piece.used + nbytes > self.piece_bytes:
            self.mark(piece, stream)
            piece = self.next()
        address = piece.address + piece.used
        piece.used += (nbytes + 63) & -64
        return address

    def next(self) -> _Piece:
        """The following piece, empty."""
        self._index = (self._index + 1) % len(self._pieces)
        piece = self._pieces[self._index]
        if piece.unloading is not None:
            piece.unloading.result()
            piece.unloading = None
        if piece.is_pending:
            self._driver.synchronize_event(piece.event)
            piece.is_pending = False
        piece.used = 0
        return piece

    def mark(self, piece: _Piece, stream: int) -> None:
        """Note that everything that uses a piece has been queued."""
        self._driver.record_event(piece.event, stream)
        piece.is_pending = True


class Staging:
    """Copies between pageable host memory and the GPU by way of page-locked memory.

    The GPU's copy engine only reads memory that cannot be paged out. Several threads copy pieces into it,
    which also spreads the page faults of a memory-mapped file, while earlier pieces are on the bus. All
    copies go through one queue, the one that kernels use, so their order is that of the calls.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._small: _Ring | None = None
        self._large: _Ring | None = None

    def upload(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Copy from the host; on return the source may be overwritten, the copy may still be queued."""
        with self._lock:
            if nbytes <= SMALL_COPY_BYTES:
                staged = self._small_ring().take(nbytes, stream)
                ctypes.memmove(staged, src, nbytes)
                self._driver.copy(dst, staged, nbytes, stream)
            else:
                self._upload_pieces(dst, src, nbytes, stream)

    def download(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Copy to the host; complete on return."""
        with self._lock:
            if nbytes <= SMALL_COPY_BYTES:
                staged = self._small_ring().take(nbytes, stream)
                self._driver.copy(staged, src, nbytes, stream)
                self._driver.synchronize_stream(stream)
                ctypes.memmove(dst, staged, nbytes)
            else:
                self._download_pieces(dst, src, nbytes, stream)

    def _upload_pieces(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        ring = self._large_ring()
        filling: deque[tuple[Future[int], _Piece, int, int]] = deque()

        def send() -> None:
            filled, piece, offset, size = filling.popleft()
            filled.result()
            self._driver.copy(dst + offset, piece.address, size, stream)
            ring.mark(piece, stream)

        for offset in range(0, nbytes, ring.piece_bytes):
            size = min(ring.piece_bytes, nbytes - offset)
            piece = ring.next()
            job = _fillers().submit(ctypes.memmove, piece.address, src + offset, size)
            filling.append((job, piece, offset, size))
            if len(filling) == len(ring) // 2:
                send()
        while filling:
            send()

    def _download_pieces(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        ring = self._large_ring()
        coming: deque[tuple[_Piece, int, int]] = deque()
        unloading: list[Future[int]] = []

        def unload() -> None:
            piece, offset, size = coming.popleft()
            self._driver.synchronize_event(piece.event)
            piece.unloading = _fillers().submit(ctypes.memmove, dst + offset, piece.address, size)
            unloading.append(piece.unloading)

        for offset in range(0, nbytes, ring.piece_bytes):
            size = min(ring.piece_bytes, nbytes - offset)
            piece = ring.next()
            self._driver.copy(piece.address, src + offset, size, stream)
            ring.mark(piece, stream)
            coming.append((piece, offset, size))
            if len(coming) == len(ring) // 2:
                unload()
        while coming:
            unload()
        for job in unloading:
            job.result()

    def _small_ring(self) -> _Ring:
        if self._small is None:
            self._small = _Ring(self._driver, _SMALL_PIECE_BYTES, _SMALL_PIECES)
        return self._small

    def _large_ring(self) -> _Ring:
        if self._large is None:
            self._large = _Ring(self._driver, _LARGE_PIECE_BYTES, _LARGE_PIECES)
        return self._large


@lru_cache(maxsize=1)
def _fillers() -> ThreadPoolExecutor:
    """The threads that copy within the host's memory (ctypes lets other threads run meanwhile)."""
    return ThreadPoolExecutor(min(_MAX_FILLERS, os.cpu_count() or 1), thread_name_prefix="kuiper-copy")
