"""The caching pool between the tensors of a device and its memory source.

Reserving raw memory is slow. The `Allocator` keeps what it has reserved and hands it out again, so that an
eager operation pays about a microsecond for its result.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kuiperllm.core.memory import Buffer, MemorySource
from kuiperllm.errors import OutOfMemoryError, UsageError

if TYPE_CHECKING:
    from kuiperllm.core.device import Device

LARGE_BYTES = 1 << 20
"""Blocks from this size on are reserved one by one; smaller ones are cut from slabs."""

SLAB_BYTES = 4 << 20
"""What is reserved at a time for small blocks."""


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """What an allocator has handed out and what it holds; sizes count whole blocks, rounding included."""

    allocated_bytes: int
    """In use by live buffers."""
    reserved_bytes: int
    """Held from the device: in use or cached."""
    peak_allocated_bytes: int
    """The most that was in use since the start or `Allocator.reset_peak`."""
    peak_reserved_bytes: int
    """The most that was held since the start or `Allocator.reset_peak`."""
    num_allocations: int
    """Buffers handed out since the start."""
    num_reserves: int
    """How many times the device itself had to be asked."""


class _Region:
    """Memory reserved from the source at one time: a slab of small blocks, or one large block."""

    __slots__ = ("address", "num_blocks", "size", "used")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.used = 0
        self.num_blocks = 0


class _Block:
    """A piece of a region that is handed out as a whole."""

    __slots__ = ("address", "pool", "region", "size")

    def __init__(self, address: int, size: int, region: _Region, pool: _Pool) -> None:
        self.address = address
        self.size = size
        self.region = region
        self.pool = pool


class _Pool:
    """Free blocks: small ones by size class, large ones ordered by size."""

    __slots__ = ("bins", "heir", "large", "slab")

    def __init__(self) -> None:
        self.heir: _Pool | None = None
        self.bins: dict[int, list[_Block]] = {}
        self.large: list[_Block] = []
        self.slab: _Region | None = None

    def put(self, block: _Block) -> None:
        """Take a block back."""
        if self.heir is not None:
            block.pool = self.heir
            self.heir.put(block)
        elif block.size >= LARGE_BYTES:
            insort(self.large, block, key=_size_of)
        elif (blocks := self.bins.get(block.size)) is None:
            self.bins[block.size] = [block]
        else:
            blocks.append(block)

    def retire(self, heir: _Pool) -> None:
        """Leave every block, those still in use included, to another pool."""
        self.heir = heir
        for blocks in (*self.bins.values(), self.large):
            for block in blocks:
                self.put(block)
        self.bins, self.large, self.slab = {}, [], None

    def take_large(self, size: int) -> _Block | None:
        """The smallest free block of at least `size` bytes that wastes at most an eighth."""
        index = bisect_left(self.large, size, key=_size_of)
        if index < len(self.large) and self.large[index].size <= size + size // 8:
            return self.large.pop(index)
        return None


def _size_of(block: _Block) -> int:
    return block.size


class _Lease:
    """Held by everything that uses a block; the block is free when the last holder goes.

    A finalizer may run at any moment, also while its own thread is inside the allocator, so it takes no lock
    and touches no free list: it leaves the block where the allocator will look before its next decision.
    """

    __slots__ = ("block", "returned")

    def __init__(self, block: _Block, returned: deque[_Block]) -> None:
        self.block = block
        self.returned = returned

    def __del__(self) -> None:
        self.returned.append(self.block)


class PrivatePool:
    """Keeps the memory that a graph was captured on from being used for anything else.

    Whoever replays the graph holds it; when it goes, its free memory goes to the allocator's common pool, and
    what tensors still use follows when they let go.
    """

    __slots__ = ("_retired", "pool")

    def __init__(self, pool: _Pool, retired: deque[_Pool]) -> None:
        self.pool = pool
        self._retired = retired

    def __del__(self) -> None:
        self._retired.append(self.pool)

    def owns(self, buffer: Buffer) -> bool:
        """Whether the memory of a buffer came from this pool."""
        owner = buffer.owner()
        return isinstance(owner, _Lease) and owner.block.pool is self.pool


class Allocator:
    """A caching pool over one memory source; host and GPU memory alike; safe to use from several threads.

    Sizes below 1 MiB are rounded up to size classes an eighth of a power of two apart (at most 12.5 % waste)
    and cut from slabs. Larger ones are rounded to the granularity of the source, reserved one by one, and
    reused for requests that waste at most 12.5 % of them. What is freed stays cached, the last freed is
    reused first, and it goes back to the device when an allocation would otherwise fail or `empty_cache` is
    called. A freed block may be handed out again at once: work on a device must be queued in the order of
    the calls, as it is on a CPU and on one CUDA stream.
    """

    def __init__(self, source: MemorySource, device: Device) -> None:
        self.source = source
        self.device = device
        self._lock = threading.Lock()
        self._returned: deque[_Block] = deque()
        self._retired: deque[_Pool] = deque()
        self._pool = _Pool()
        self._private: dict[int, _Pool] = {}
        self._min_shift = source.alignment.bit_length() - 1
        self._allocated = self._reserved = 0
        self._peak_allocated = self._peak_reserved = 0
        self._num_allocations = self._num_reserves = 0

    def allocate(self, nbytes: int) -> Buffer:
        """A buffer of `nbytes` bytes, uninitialized, aligned to the alignment of the source.

        Raises:
            OutOfMemoryError: the device has not that much left, even after the cache was emptied.
            UsageError: the size is negative.
        """
        if nbytes <= 0:
            return self._empty_buffer(nbytes)
        with self._lock:
            if self._returned or self._retired:
                self._collect()
            pool = self._private.get(threading.get_ident(), self._pool) if self._private else self._pool
            block = self._take_small(pool, nbytes) if nbytes < LARGE_BYTES else self._take_large(pool, nbytes)
            self._num_allocations += 1
            self._allocated += block.size
            if self._allocated > self._peak_allocated:
                self._peak_allocated = self._allocated
        return Buffer(_Lease(block, self._returned), block.address, nbytes, self.device)

    def stats(self) -> MemoryStats:
        """The counters as they are now."""
        with self._lock:
            self._collect()
            return MemoryStats(
                allocated_bytes=self._allocated,
                reserved_bytes=self._reserved,
                peak_allocated_bytes=self._peak_allocated,
                peak_reserved_bytes=self._peak_reserved,
                num_allocations=self._num_allocations,
                num_reserves=self._num_reserves,
            )

    def reset_peak(self) -> None:
        """Start measuring both peaks anew, from what is in use now."""
        with self._lock:
            self._collect()
            self._peak_allocated = self._allocated
            self._peak_reserved = self._reserved

    def empty_cache(self) -> None:
        """Give every region that has no block in use back to the device."""
        with self._lock:
            self._collect()
            self._release_free_regions()

    @contextmanager
    def private_pool(self, pool: PrivatePool | None = None) -> Iterator[PrivatePool]:
        """Take what this thread allocates inside the `with` block from a pool of its own.

        What is free in the common pool goes over to it where it serves.

        A graph that is replayed writes to the memory that was freed while it was captured as well, so nothing
        else may be given that memory. Graphs that are never replayed at the same time may share a pool.

        Args:
            pool: one that an earlier block gave, to go on with it.
        """
        if pool is None:
            pool = PrivatePool(_Pool(), self._retired)
        thread = threading.get_ident()
        with self._lock:
            outer = self._private.get(thread)
            self._private[thread] = pool.pool
        try:
            yield pool
        finally:
            with self._lock:
                if outer is None:
                    del self._private[thread]
                else:
                    self._private[thread] = outer

    def _empty_buffer(self, nbytes: int) -> Buffer:
        if nbytes < 0:
            raise UsageError(f"cannot allocate {nbytes} bytes: the size is negative")
        with self._lock:
            self._num_allocations += 1
        return Buffer(None, 0, 0, self.device)

    # The methods below are called with the lock held.

    def _collect(self) -> None:
        """Put the blocks that finalizers left behind back into their pools."""
        while self._returned:
            block = self._returned.popleft()
            self._allocated -= block.size
            block.pool.put(block)
        while self._retired:
            self._retired.popleft().retire(self._pool)

    def _take_small(self, pool: _Pool, nbytes: int) -> _Block:
        shift = max((nbytes - 1).bit_length() - 4, self._min_shift)
        size = -(-nbytes >> shift) << shift
        if size >= LARGE_BYTES:
            return self._take_large(pool, size)
        if not (blocks := pool.bins.get(size) or self._pool.bins.get(size)):
            return self._carve(pool, size)
        block = blocks.pop()
        block.pool = pool
        return block

    def _carve(self, pool: _Pool, size: int) -> _Block:
        slab = pool.slab
        if slab is None or slab.size - slab.used < size:
            slab = self._reserve(SLAB_BYTES)
            pool.slab = slab
        block = _Block(slab.address + slab.used, size, slab, pool)
        slab.used += size
        slab.num_blocks += 1
        return block

    def _take_large(self, pool: _Pool, nbytes: int) -> _Block:
        granularity = self.source.granularity
        size = (nbytes + granularity - 1) & -granularity
        block = pool.take_large(size)
        if block is None and (block := self._pool.take_large(size)) is not None:
            block.pool = pool
        if block is None:
            region = self._reserve(size)
            region.num_blocks = 1
            block = _Block(region.address, size, region, pool)
        return block

    def _reserve(self, nbytes: int) -> _Region:
        try:
            address = self.source.reserve(nbytes)
        except OutOfMemoryError:
            if not self._release_free_regions():
                raise
            address = self.source.reserve(nbytes)
        region = _Region(address, nbytes)
        self._num_reserves += 1
        self._reserved += nbytes
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        return region

    def _release_free_regions(self) -> bool:
        """Release the regions of the common pool all of whose blocks are free; whether there were any."""
        pool = self._pool
        free: dict[_Region, int] = {}
        for blocks in (*pool.bins.values(), pool.large):
            for block in blocks:
                free[block.region] = free.get(block.region, 0) + 1
        gone = {region for region, count in free.items() if count == region.num_blocks}
        if pool.slab in gone:
            pool.slab = None
        pool.large = [block for block in pool.large if block.region not in gone]
        for size, blocks in pool.bins.items():
            pool.bins[size] = [block for block in blocks if block.region not in gone]
        for region in gone:
            self._reserved -= region.size
            self.source.release(region.address, region.size)
        return bool(gone)
