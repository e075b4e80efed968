"""One GPU as a device: one queue for kernels and copies, so that work is done in the order of the calls."""

from __future__ import annotations

import ctypes
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kuiperllm.backends.cuda.driver import Driver
from kuiperllm.backends.cuda.graph import CudaGraph, EmptyGraph
from kuiperllm.backends.cuda.memory import DeviceMemory, PinnedBlock, Staging
from kuiperllm.core.device import Backend, CopyKind, Device, Event, Graph
from kuiperllm.core.dtype import DType
from kuiperllm.core.layout import checked_shape
from kuiperllm.core.memory import Buffer, format_bytes
from kuiperllm.core.tensor import Tensor
from kuiperllm.errors import DeviceError, KuiperError

if TYPE_CHECKING:
    import numpy.typing as npt

    from kuiperllm.backends.cuda.jit import Kernel

Collected = dict["Kernel", None]

_backends: WeakValueDictionary[int, CudaBackend] = WeakValueDictionary()
"""The GPUs in use: a copy between two of them has to wait for both."""


class CudaBackend(Backend):
    """One GPU.

    Calls may come from any thread. While a thread records a graph, or only collects kernels, what it queues
    goes there; other threads go on working.
    """

    name = "cuda"

    def __init__(self, index: int, driver: Driver) -> None:
        self.index = index
        self.driver = driver
        self.source = self._memory = DeviceMemory(driver)
        self.modes: dict[int, CudaGraph | Collected] = {}
        """By thread: the graph that it records, or the kernels that it collects."""
        self.launch_lock = threading.Lock()
        self.activate = driver.activate
        driver.activate()
        self._stream = driver.create_stream()
        self._recording_streams: list[int] = []
        self._staging = Staging(driver)
        self._retired: deque[int] = deque()
        self._events: deque[int] = deque()
        _backends[index] = self

    # --- the queue ----------------------------------------------------------------------------------------

    @property
    def stream(self) -> int:
        """The queue that the calling thread's work goes to."""
        if self.modes and isinstance(mode := self.modes.get(threading.get_ident()), CudaGraph):
            return mode.stream
        return self._stream

    @property
    def stream_handle(self) -> int | None:  # type: ignore[override]
        """The queue as DLPack numbers it."""
        return self._stream

    def synchronize(self) -> None:
        """Wait until all queued work is done.

        Raises:
            DeviceError: some of it failed.
        """
        self.activate()
        self.driver.synchronize_stream(self._stream)

    def record(self, *, timing: bool = False) -> CudaEvent:
        """Put a mark behind what is queued.

        Args:
            timing: whether the mark notes the time, which costs a little.
        """
        self.activate()
        event = CudaEvent(self, self._new_event(timing), timing)
        self.driver.record_event(event.handle, self._stream)
        return event

    def _new_event(self, timing: bool) -> int:
        try:
            return self.driver.create_event(timing=True) if timing else self._events.pop()
        except IndexError:
            return self.driver.create_event()

    # --- copies -------------------------------------------------------------------------------------------

    def copy(self, dst_address: int, src_address: int, nbytes: int, kind: CopyKind) -> None:
        """Copy bytes to, from or within this GPU, or from another one to this one.

        While a graph is recorded, copies within the GPU become part of it; others are done at once.

        Raises:
            DeviceError: both ends are on the host.
        """
        if isinstance(self._mode(), dict):
            if kind is CopyKind.device_to_host:
                ctypes.memset(dst_address, 0, nbytes)
            return
        self.activate()
        if kind is CopyKind.host_to_device:
            self._staging.upload(dst_address, src_address, nbytes, self._stream)
        elif kind is CopyKind.device_to_host:
            self._staging.download(dst_address, src_address, nbytes, self._stream)
        elif kind is CopyKind.device_to_device:
            self._copy_on_device(dst_address, src_address, nbytes)
        else:
            raise DeviceError("the CUDA back end cannot copy host to host: the CPU has to")

    def _copy_on_device(self, dst: int, src: int, nbytes: int) -> None:
        if len(_backends) > 1 and not (self._memory.owns(dst) and self._memory.owns(src)):
            self._copy_between_devices(dst, src, nbytes)
        elif abs(dst - src) < nbytes:
            spare = self.spare(nbytes)
            self.driver.copy(spare.address, src, nbytes, self.stream)
            self.driver.copy(dst, spare.address, nbytes, self.stream)
        else:
            self.driver.copy(dst, src, nbytes, self.stream)

    def _copy_between_devices(self, dst: int, src: int, nbytes: int) -> None:
        """Copy from another GPU when it has computed the values; it goes on when they have been read."""
        others = [backend for backend in _backends.values() if backend is not self]
        for other in others:
            if other._memory.owns(src):
                other.driver.share_with(self.index)
            self._wait_for(other)
        self.activate()
        self.driver.copy(dst, src, nbytes, self._stream)
        for other in others:
            other._wait_for(self)
        self.activate()

    def _wait_for(self, other: CudaBackend) -> None:
        mark = other.record()
        self.activate()
        self.driver.wait_event(self._stream, mark.handle)

    def copy_strided(
        self,
        dst_address: int,
        dst_strides: Sequence[int],
        src_address: int,
        src_strides: Sequence[int],
        shape: Sequence[int],
        itemsize: int,
    ) -> None:
        """Copy elements between two strided views on this GPU; they may overlap."""
        from kuiperllm.backends.cuda.copy import copy_strided

        copy_strided(self, dst_address, dst_strides, src_address, src_strides, shape, itemsize)

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Set `nbytes` bytes to `byte`, at once even while a graph is recorded."""
        if isinstance(self._mode(), dict):
            return
        self.activate()
        self.driver.fill(address, byte, nbytes, self._stream)

    def spare(self, nbytes: int) -> Buffer:
        """Memory for the time of a copy: who gets it next overwrites it behind that in the queue."""
        return self.device.allocator.allocate(nbytes)

    @property
    def device(self) -> Device:
        """The device that this is the back end of."""
        return Device(f"cuda:{self.index}")

    # --- memory of the host -------------------------------------------------------------------------------

    def pinned(self, shape: int | Sequence[int], dtype: DType | str) -> tuple[npt.NDArray[Any], Tensor]:
        """Page-locked memory of the host, zeroed, seen by both: a NumPy array and a tensor of this device.

        Kernels read and write it over the bus, a few bytes at a time; wait for an `Event` before reading here
        what they wrote.

        Raises:
            OutOfMemoryError: the host has not that much left.
        """
        dtype = DType.of(dtype)
        sizes = checked_shape(shape, dtype.itemsize)
        nbytes = max(math.prod(sizes) * dtype.itemsize, 1)
        self.activate()
        if self._retired:
            self.driver.synchronize_stream(self._stream)
            while self._retired:
                self.driver.free_host(self._retired.popleft())
        block = PinnedBlock(self.driver.allocate_host(nbytes), self._retired)
        ctypes.memset(block.address, 0, nbytes)
        host = Buffer.wrap(block, block.address, nbytes, Device("cpu"), writable=True)
        here = Buffer.wrap(block, block.address, nbytes, self.device, writable=True)
        return Tensor(host, dtype, sizes).numpy(), Tensor(here, dtype, sizes)

    # --- recording ----------------------------------------------------------------------------------------

    def _mode(self) -> CudaGraph | Collected | None:
        return self.modes.get(threading.get_ident()) if self.modes else None

    def intercepts(self, kernel: Kernel, arguments: tuple[object, ...]) -> bool:
        """Whether a launch by this thread ends here, because kernels are only collected."""
        mode = self._mode()
        if isinstance(mode, CudaGraph):
            mode.keep(arguments)
        elif mode is not None:
            mode[kernel] = None
            return True
        return False

    @contextmanager
    def collecting(self, kernels: Collected) -> Iterator[None]:
        """Note the kernels that this thread launches, instead of running anything; see `launch.collecting`.

        Raises:
            DeviceError: this thread is recording a graph.
        """
        with self._as_mode(kernels):
            yield

    def prepare(self, work: Callable[[], object]) -> None:
        """Compile the kernels that `work` would launch, on all processors at once, without running it."""
        from kuiperllm.backends.cuda.launch import compile_all, load

        kernels: Collected = {}
        with self.collecting(kernels):
            work()
        compile_all(kernels, self.device)
        for kernel in kernels:
            load(kernel, self.device)

    @contextmanager
    def capture(self, beside: Graph | None = None) -> Iterator[Graph]:
        """Record what this thread queues inside the `with` block.

        What is allocated meanwhile comes from a pool that belongs to the graph: memory that an operator gives
        up serves the next one, and nothing else.

        Args:
            beside: a graph whose pool this one uses as well; see `Device.capture`.

        Raises:
            DeviceError: a capture is already under way in this thread, or something was queued that cannot
                be recorded.
        """
        if isinstance(self._mode(), dict):
            yield EmptyGraph()
            return
        self.activate()
        stream = self._recording_streams.pop() if self._recording_streams else self.driver.create_stream()
        shared = beside.pool if isinstance(beside, CudaGraph) else None
        with self.device.allocator.private_pool(shared) as pool:
            graph = CudaGraph(self, pool, stream)
            with self._as_mode(graph):
                self.driver.begin_capture(stream)
                try:
                    yield graph
                except BaseException:
                    with suppress(KuiperError):  # the first error is the one to tell
                        self.driver.destroy_graph(self.driver.end_capture(stream))
                    raise
                graph.finish(self.driver.end_capture(stream))
        self._recording_streams.append(stream)

    @contextmanager
    def _as_mode(self, mode: CudaGraph | Collected) -> Iterator[None]:
        thread = threading.get_ident()
        if thread in self.modes:
            raise DeviceError("a graph is already being captured; finish it first")
        self.modes[thread] = mode
        try:
            yield
        finally:
            del self.modes[thread]

    def replay(self, graph: int) -> None:
        """Queue a recorded graph."""
        if isinstance(self._mode(), dict):
            return
        self.activate()
        self.driver.launch_graph(graph, self._stream)

    # --- facts --------------------------------------------------------------------------------------------

    def read_bandwidth(self) -> float:
        """Bytes per second that a kernel reads from this GPU's memory."""
        from kuiperllm.backends.cuda.bandwidth import read_bandwidth

        return read_bandwidth(self)

    def peers(self) -> tuple[int, ...]:
        """The GPUs in use whose memory this one reads directly."""
        return tuple(i for i in sorted(_backends) if i != self.index and self.driver.can_access_peer(i))

    @property
    def properties(self) -> Mapping[str, object]:
        """Facts about the GPU for people."""
        chip = self.driver.chip
        return {
            "name": chip.name,
            "compute_capability": "{}.{}".format(*chip.compute_capability),
            "multiprocessors": chip.multiprocessors,
            "memory": format_bytes(chip.total_bytes),
            "l2_cache": format_bytes(chip.l2_bytes),
            "pci_bus_id": chip.pci_bus_id,
            "driver": f"CUDA {chip.driver_version}",
        }


class CudaEvent(Event):
    """A mark in the queue of a GPU."""

    __slots__ = ("_backend", "_timing", "handle")

    def __init__(self, backend: CudaBackend, handle: int, timing: bool) -> None:
        self.handle = handle
        self._backend = backend
        self._timing = timing

    def wait(self) -> None:
        """Wait until everything that was queued in front of the mark is done.

        Raises:
            DeviceError: some of it failed.
        """
        self._backend.activate()
        self._backend.driver.synchronize_event(self.handle)

    def ms_since(self, start: CudaEvent) -> float:
        """Milliseconds between two marks that were recorded with `timing=True`, once both are passed."""
        self.wait()
        return self._backend.driver.elapsed_ms(start.handle, self.handle)

    def __del__(self) -> None:
        if not self._timing:
            self._backend._events.append(self.handle)
            return
        with suppress(KuiperError):
            self._backend.activate()
            self._backend.driver.destroy_event(self.handle)
