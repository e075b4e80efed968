"""Memory of every device: where it comes from, the pool that caches it, and the buffers that own it.

A back end supplies a `MemorySource`, which reserves and releases raw memory and is slow. The `Allocator`
keeps what it has reserved and hands it out again, so that an eager operation pays about a microsecond for
its result. A `Buffer` is the right to use a piece of memory, for exactly as long as something refers to it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from kuiperllm.errors import MemoryLifetimeError, OutOfMemoryError, UsageError

if TYPE_CHECKING:
    from kuiperllm.core.device import Device

LARGE_BYTES = 1 << 20
"""Blocks from this size on are reserved one by one; smaller ones are cut from slabs."""

SLAB_BYTES = 4 << 20
"""What is reserved at a time for small blocks."""


class MemoryInfo(NamedTuple):
    """How much memory a device has."""

    free_bytes: int
    total_bytes: int


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


class CopyKind(Enum):
    """Where the two ends of a copy live."""

    host_to_host = "host to host"
    host_to_device = "host to device"
    device_to_host = "device to host"
    device_to_device = "device to device"

    @classmethod
    def between(cls, dst: Device, src: Device) -> CopyKind:
        """The kind of a copy from `src` to `dst`."""
        if src.is_host:
            return cls.host_to_host if dst.is_host else cls.host_to_device
        return cls.device_to_host if dst.is_host else cls.device_to_device


class MemorySource(ABC):
    """Raw memory of one device."""

    alignment: int = 64
    """Every reserved address, and every block cut from it, is a multiple of this power of two (bytes)."""
    granularity: int = 4096
    """Reservations are rounded up to a multiple of this power of two (bytes)."""

    @abstractmethod
    def reserve(self, nbytes: int) -> int:
        """Reserve `nbytes` of memory, uninitialized, and return its address.

        Raises:
            OutOfMemoryError: the device has less free memory than that.
        """

    @abstractmethod
    def release(self, address: int, nbytes: int) -> None:
        """Give back what `reserve(nbytes)` returned."""

    @abstractmethod
    def info(self) -> MemoryInfo:
        """The free and the total memory of the device."""


def out_of_memory(device: str, nbytes: int, info: MemoryInfo) -> OutOfMemoryError:
    """The error that every memory source raises when `nbytes` are more than it can give."""
    return OutOfMemoryError(
        f"{device} memory: needs {format_bytes(nbytes)}, has {format_bytes(info.free_bytes)} free of "
        f"{format_bytes(info.total_bytes)}; use a smaller model, quantization or a smaller max_model_len"
    )


def format_bytes(nbytes: int) -> str:
    """A size for people: "1.50 GiB", "12 KiB"."""
    if nbytes >= 1 << 30:
        return f"{nbytes / (1 << 30):.2f} GiB"
    if nbytes >= 1 << 20:
        return f"{nbytes / (1 << 20):.1f} MiB"
    if nbytes >= 1 << 10:
        return f"{nbytes / (1 << 10):.0f} KiB"
    return f"{nbytes} bytes"


# --- buffers ----------------------------------------------------------------------------------------------


def _released() -> bool:
    return False


class Buffer:
    """The right to use `nbytes` of memory at `address` on `device`.

    Allocated memory goes back to its allocator when the last user goes: the buffer, the tensors on it, the
    NumPy arrays and DLPack capsules made from them. Wrapped memory stays with its owner, which the buffer
    keeps referenced. `release` ends the right at once; whoever asks for the address later gets an error,
    while memory that NumPy or another library still looks at stays valid until they let go.
    """

    __slots__ = ("__weakref__", "_address", "_alive", "_owner", "device", "nbytes", "writable")

    def __init__(
        self,
        owner: object,
        address: int,
        nbytes: int,
        device: Device,
        writable: bool = True,
        alive: Callable[[], bool] | None = None,
    ) -> None:
        self._owner = owner
        self._address = address
        self._alive = alive
        self.nbytes = nbytes
        self.device = device
        self.writable = writable

    @classmethod
    def wrap(
        cls,
        owner: object,
        address: int,
        nbytes: int,
        device: Device,
        *,
        writable: bool,
        alive: Callable[[], bool] | None = None,
    ) -> Buffer:
        """Use memory that `owner` owns (a NumPy array, a memory map, a DLPack tensor), without copying.

        Args:
            owner: is kept referenced for as long as the memory is used.
            address: where the memory starts.
            nbytes: how long it is.
            device: where it lives.
            writable: whether it may be written to.
            alive: says whether the memory is still there, for an owner that can be closed early, such as a
                memory map; asked each time the address is read.

        Raises:
            UsageError: the size is negative, or there is a size but no address.
        """
        if nbytes < 0 or address < 0 or (nbytes > 0 and address == 0):
            raise UsageError(f"cannot wrap {nbytes} bytes at address {address:#x}: not a piece of memory")
        return cls(owner, address, nbytes, device, writable, alive)

    @property
    def address(self) -> int:
        """Where the memory starts; 0 if it is empty.

        Raises:
            MemoryLifetimeError: the memory was released, or its owner closed it.
        """
        if self._alive is not None:
            self.owner()
        return self._address

    @property
    def is_alive(self) -> bool:
        """Whether the memory can still be used."""
        return self._alive is None or self._alive()

    def owner(self) -> object:
        """What keeps the memory valid: hold on to it wherever the bare address outlives the buffer.

        Raises:
            MemoryLifetimeError: the memory was released, or its owner closed it.
        """
        if not self.is_alive:
            what = "was released" if self._alive is _released else "was closed by its owner"
            raise MemoryLifetimeError(
                f"the memory of a buffer of {format_bytes(self.nbytes)} on {self.device} {what}; "
                "keep it open for as long as its tensors are used, or copy them first"
            )
        return self._owner

    def release(self) -> None:
        """Give up the memory now; a second call does nothing."""
        self._alive = _released
        self._owner = None

    def copy_from(
        self, src: Buffer, nbytes: int | None = None, dst_offset: int = 0, src_offset: int = 0
    ) -> None:
        """Copy `nbytes` bytes (default: the rest of `src`) from `src`, on whatever device it lives.

        The two pieces may overlap.

        Raises:
            UsageError: a piece reaches outside its buffer, or this buffer is read-only.
            MemoryLifetimeError: the memory of one of them is gone.
        """
        if nbytes is None:
            nbytes = src.nbytes - src_offset
        self.require_writable()
        self._require_inside(dst_offset, nbytes)
        src._require_inside(src_offset, nbytes)
        dst_address, src_address = self.address + dst_offset, src.address + src_offset
        if nbytes:
            worker = src.device if self.device.is_host else self.device
            worker.backend.copy(dst_address, src_address, nbytes, CopyKind.between(self.device, src.device))

    def fill(self, byte: int) -> None:
        """Set every byte to `byte` (0 to 255).

        Raises:
            UsageError: the value is not a byte, or this buffer is read-only.
            MemoryLifetimeError: the memory is gone.
        """
        if not 0 <= byte <= 255:
            raise UsageError(f"cannot fill memory with {byte}: a byte is from 0 to 255")
        self.require_writable()
        address = self.address
        if self.nbytes:
            self.device.backend.fill(address, byte, self.nbytes)

    def require_writable(self) -> None:
        """Check that the memory may be written to.

        Raises:
            UsageError: it is read-only.
        """
        if not self.writable:
            raise UsageError(
                f"a buffer of {format_bytes(self.nbytes)} on {self.device} is read-only; copy it first"
            )

    def _require_inside(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise UsageError(
                f"{nbytes} bytes at offset {offset} reach outside a buffer of {self.nbytes} bytes"
            )

    def __repr__(self) -> str:
        state = "" if self.is_alive else ", released"
        return f"Buffer({format_bytes(self.nbytes)}, device={self.device}{state})"


# --- the caching pool -------------------------------------------------------------------------------------


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

    __slots__ = ("bins", "large", "slab")

    def __init__(self) -> None:
        self.bins: dict[int, list[_Block]] = {}
        self.large: list[_Block] = []
        self.slab: _Region | None = None

    def put(self, block: _Block) -> None:
        if block.size >= LARGE_BYTES:
            insort(self.large, block, key=_size_of)
        elif (blocks := self.bins.get(block.size)) is None:
            self.bins[block.size] = [block]
        else:
            blocks.append(block)

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
        self._pool = _Pool()
        self._min_shift = source.alignment.bit_length() - 1
        self._regions: set[_Region] = set()
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
            if self._returned:
                self._collect()
            block = self._take_small(nbytes) if nbytes < LARGE_BYTES else self._take_large(nbytes)
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

    # The methods below are called with the lock held.

    def _empty_buffer(self, nbytes: int) -> Buffer:
        if nbytes < 0:
            raise UsageError(f"cannot allocate {nbytes} bytes: the size is negative")
        with self._lock:
            self._num_allocations += 1
        return Buffer(None, 0, 0, self.device)

    def _collect(self) -> None:
        """Put the blocks that finalizers left behind back into their pools."""
        while self._returned:
            block = self._returned.popleft()
            self._allocated -= block.size
            block.pool.put(block)

    def _take_small(self, nbytes: int) -> _Block:
        shift = max((nbytes - 1).bit_length() - 4, self._min_shift)
        size = -(-nbytes >> shift) << shift
        if size >= LARGE_BYTES:
            return self._take_large(size)
        blocks = self._pool.bins.get(size)
        return blocks.pop() if blocks else self._carve(self._pool, size)

    def _carve(self, pool: _Pool, size: int) -> _Block:
        slab = pool.slab
        if slab is None or slab.size - slab.used < size:
            slab = self._reserve(SLAB_BYTES)
            pool.slab = slab
        block = _Block(slab.address + slab.used, size, slab, pool)
        slab.used += size
        slab.num_blocks += 1
        return block

    def _take_large(self, nbytes: int) -> _Block:
        granularity = self.source.granularity
        size = (nbytes + granularity - 1) & -granularity
        block = self._pool.take_large(size)
        if block is None:
            region = self._reserve(size)
            region.num_blocks = 1
            block = _Block(region.address, size, region, self._pool)
        return block

    def _reserve(self, nbytes: int) -> _Region:
        try:
            address = self.source.reserve(nbytes)
        except OutOfMemoryError:
            if not self._release_free_regions():
                raise
            address = self.source.reserve(nbytes)
        region = _Region(address, nbytes)
        self._regions.add(region)
        self._num_reserves += 1
        self._reserved += nbytes
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        return region

    def _release_free_regions(self) -> bool:
        """Release the regions all of whose blocks are free; whether there were any."""
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
            self._regions.discard(region)
            self._reserved -= region.size
            self.source.release(region.address, region.size)
        return bool(gone)
