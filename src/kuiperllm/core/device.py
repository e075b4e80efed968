"""Devices and what a back end must offer to be one.

`Device("cpu")` finds the package `kuiperllm.backends.cpu` by name and asks it for a `Backend`. That is the
one place where a lower layer reaches a higher one.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from kuiperllm.core.allocator import Allocator
from kuiperllm.core.memory import CopyKind, MemoryInfo, MemorySource
from kuiperllm.errors import DeviceError

if TYPE_CHECKING:
    import numpy.typing as npt

    from kuiperllm.core.dtype import DType
    from kuiperllm.core.tensor import Tensor

__all__ = ["Backend", "CopyKind", "Device", "Event", "Graph", "MemoryInfo"]

_BACKENDS = "kuiperllm.backends"


class Graph(ABC):
    """Work that was captured once and can be queued again as a whole."""

    @abstractmethod
    def replay(self) -> None:
        """Queue the captured work again, on the same memory."""


class Event(ABC):
    """A mark in the queue of a device."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until all work queued before the mark is done.

        Raises:
            DeviceError: some of it failed.
        """


class Backend(ABC):
    """What one device can do without knowing any tensor: memory, copies, waiting, capturing.

    Work is queued in the order of the calls. Copies to the host are complete when `copy` returns; after any
    copy the source may be overwritten.
    """

    name: str
    """The name of the package, such as "cpu"."""
    source: MemorySource
    """Where the device's memory comes from."""
    stream_handle: int | None = None
    """The queue of the device as DLPack numbers it; None where work is done when a call returns."""

    @abstractmethod
    def copy(self, dst_address: int, src_address: int, nbytes: int, kind: CopyKind) -> None:
        """Copy bytes; of two devices, the one that is not the host does the work. They may overlap.

        Raises:
            DeviceError: this back end cannot copy in that direction.
        """

    @abstractmethod
    def copy_strided(
        self,
        dst_address: int,
        dst_strides: Sequence[int],
        src_address: int,
        src_strides: Sequence[int],
        shape: Sequence[int],
        itemsize: int,
    ) -> None:
        """Copy elements of 1, 2, 4 or 8 bytes within this device; strides count elements, 0 repeats."""

    @abstractmethod
    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Set `nbytes` bytes to `byte`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all queued work is done.

        Raises:
            DeviceError: some of it failed.
        """

    @abstractmethod
    def record(self) -> Event:
        """A mark behind all work queued so far."""

    @abstractmethod
    def pinned(self, shape: int | Sequence[int], dtype: DType | str) -> tuple[npt.NDArray[Any], Tensor]:
        """Memory of the host, zeroed, that kernels can address: a NumPy array, and a tensor of the device.

        Wait for an event behind the kernel that writes there before reading it here.

        Raises:
            OutOfMemoryError: the host has not that much left.
        """

    def prepare(self, work: Callable[[], object]) -> None:  # noqa: B027 - most back ends compile as they go
        """Compile the kernels that `work` would launch, without running it, where that saves time."""

    @property
    def num_threads(self) -> int:
        """Processor threads that kernels run on; 0 where they run elsewhere."""
        return 0

    def set_num_threads(self, num_threads: int) -> None:  # noqa: B027 - most back ends have none to set
        """Use so many processor threads for kernels; without effect where kernels run elsewhere."""

    def read_bandwidth(self) -> float:
        """Bytes per second that kernels can read from the device's memory, measured now.

        Raises:
            DeviceError: this back end has no means to measure it.
        """
        raise DeviceError(f"the {self.name} back end cannot measure its memory")

    @abstractmethod
    def capture(self, beside: Graph | None = None) -> AbstractContextManager[Graph]:
        """Record the work queued inside the `with` block; see `Device.capture`."""

    @property
    @abstractmethod
    def properties(self) -> Mapping[str, object]:
        """Facts about the device for people: name, number of cores and the like."""


class Device:
    """A place where tensors live and operators run.

    `Device("cpu")`, `Device("cuda:0")`; `Device("cuda")` is the first GPU, and `Device("auto")` is that if it
    can be used and "cpu" otherwise. There is one object for each device, so `is` compares them.

    Raises:
        DeviceError: there is no such device, or it cannot be used; the message says why and what to do.
    """

    __slots__ = ("__weakref__", "_allocator", "_name", "backend", "index", "is_host", "type")

    _known: ClassVar[dict[str, Device]] = {}
    _lock: ClassVar[threading.RLock] = threading.RLock()

    type: str
    index: int
    is_host: bool
    backend: Backend
    _name: str
    _allocator: Allocator

    def __new__(cls, name: str | Device = "cpu") -> Device:
        """The device of this name: always the same object."""
        if isinstance(name, Device):
            return name
        found = cls._known.get(name) if isinstance(name, str) else None
        return found if found is not None else cls._find(name)

    @classmethod
    def _find(cls, name: str) -> Device:
        if name == "auto":
            return cls._auto()
        match = re.fullmatch(r"([a-z]+)(?::(\d{1,4}))?", name) if isinstance(name, str) else None
        if match is None or match[1] not in _backend_names():
            raise _unknown(name)
        kind, index = match[1], int(match[2] or 0)
        canonical = "cpu" if (kind, index) == ("cpu", 0) else f"{kind}:{index}"
        with cls._lock:
            device = cls._known.get(canonical)
            if device is None:
                device = cls._make(kind, index, canonical)
            # Remember the spelling as well ("cuda" for "cuda:0"), so that the next look-up is a plain one.
            cls._known[canonical] = cls._known[name] = device
        return device

    @classmethod
    def _auto(cls) -> Device:
        try:
            return cls("cuda:0")
        except DeviceError:
            return cls("cpu")

    @classmethod
    def _make(cls, kind: str, index: int, name: str) -> Device:
        device = super().__new__(cls)
        device.type = kind
        device.index = index
        device.is_host = kind == "cpu"
        device._name = name
        device.backend = importlib.import_module(f"{_BACKENDS}.{kind}").create(index)
        device._allocator = Allocator(device.backend.source, device)
        return device

    @property
    def allocator(self) -> Allocator:
        """The pool that the memory of this device's tensors comes from."""
        return self._allocator

    def memory_info(self) -> MemoryInfo:
        """The free and the total memory of the device, in bytes; what the pool caches is not free."""
        return self.backend.source.info()

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""
        self.backend.synchronize()

    def capture(self, beside: Graph | None = None) -> AbstractContextManager[Graph]:
        """Record the operators called inside the `with` block into a graph that can be replayed.

        The graph works on the memory that the block used: change inputs in place, then `replay()`.

        Args:
            beside: another graph of this device, whose memory for intermediate results serves this one as
                well. Each of the two may then be replayed once the other is done, and overwrites them.
        """
        return self.backend.capture(beside)

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"Device({self._name!r})"

    def __reduce__(self) -> tuple[Callable[[str], Device], tuple[str]]:
        return Device, (self._name,)


def _backend_names() -> list[str]:
    """The back ends of this version: the packages in `kuiperllm.backends`."""
    spec = importlib.util.find_spec(_BACKENDS)
    paths = spec.submodule_search_locations if spec is not None else None
    return sorted(module.name for module in pkgutil.iter_modules(paths) if module.ispkg)


def _unknown(name: object) -> DeviceError:
    devices = ", ".join(f'"{name}"' if name == "cpu" else f'"{name}:0"' for name in _backend_names())
    return DeviceError(f'unknown device {name!r}; devices are {devices} and "auto"')
