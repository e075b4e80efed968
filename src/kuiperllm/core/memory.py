"""Memory of every device: where it comes from, and the buffers that own it.

A back end supplies a `MemorySource`, which reserves and releases raw memory and is slow; the allocator in
front of it caches. A `Buffer` is the right to use a piece of memory, for exactly as long as something refers
to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from kuiperllm.errors import MemoryLifetimeError, OutOfMemoryError, UsageError

if TYPE_CHECKING:
    from kuiperllm.core.device import Device


class MemoryInfo(NamedTuple):
    """How much memory a device has."""

    free_bytes: int
    total_bytes: int


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
