"""A GPU that is not there: memory of the host, kernels run by the runtime, work done when it is queued."""

from __future__ import annotations

import ctypes
import itertools
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from emulation.compiler import EmulatedCompiler, build_runtime
from kuiperllm.backends.cuda.driver import Chip, Driver, Resources
from kuiperllm.config import settings
from kuiperllm.core.memory import MemoryInfo, out_of_memory
from kuiperllm.errors import DeviceError, KernelError, UsageError

ALIGNMENT = 512
RED_BYTES = 512
"""What is watched on either side of a piece of memory; as in runtime.cpp."""
MAX_SHARED = 227 * 1024
DEFAULT_SHARED = 48 * 1024
TOTAL_BYTES = 8 << 30

CHIP = Chip(
    name="emulated",
    compute_capability=(8, 0),
    arch="emulated",
    multiprocessors=8,
    max_shared_bytes=MAX_SHARED,
    shared_bytes_per_multiprocessor=228 * 1024,
    l2_bytes=4 << 20,
    total_bytes=TOTAL_BYTES,
    pci_bus_id="0000:00:00.0",
    driver_version="13.0",
)

Work = Callable[[], None]
T = TypeVar("T")


@dataclass
class _Module:
    library: ctypes.CDLL
    shared_start: int
    shared_bytes: int


@dataclass
class _Function:
    name: str
    module: _Module
    entry: int
    max_threads: int
    chained: bool
    sizes: list[int]
    allowed_shared: int
    """Dynamic shared memory that it may be launched with."""


@dataclass
class _Queue:
    captured: list[Work] | None = None


@dataclass
class _Event:
    timing: bool
    passed: float | None = None


@dataclass
class _Memory:
    base: int
    nbytes: int
    storage: object = field(repr=False)


class EmulatedDriver(Driver):
    """One emulated GPU."""

    def __init__(self, chip: Chip = CHIP) -> None:
        self.chip = chip
        self.seed = 0
        """The order in which threads run: 0 is the plain one, any other number a random one."""
        self.overlaps = True
        """Whether kernels start while those in front may still run, as far as values can tell."""
        self.max_seconds = 120
        """Processor time that a kernel may take."""
        self._runtime = _load_runtime()
        self._lock = threading.RLock()
        self._handles = itertools.count(1)
        self._objects: dict[int, object] = {}
        self._memory: dict[int, _Memory] = {}
        self._used = 0
        self._message = ctypes.create_string_buffer(1024)
        self._unguarded: deque[tuple[int, int]] = deque()

    def activate(self) -> None:
        pass

    # --- memory -------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        if self._used + nbytes > self.chip.total_bytes:
            raise out_of_memory("cuda:0", nbytes, MemoryInfo(*self.memory_info()))
        self._used += nbytes
        return self._new_memory(nbytes)

    def free(self, address: int) -> None:
        self._used -= self._drop_memory(address)

    def allocate_host(self, nbytes: int) -> int:
        return self._new_memory(nbytes)

    def free_host(self, address: int) -> None:
        self._drop_memory(address)

    def memory_info(self) -> tuple[int, int]:
        return self.chip.total_bytes - self._used, self.chip.total_bytes

    def copy(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        self._queue(stream, lambda: self._move(dst, src, nbytes))

    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        self._queue(stream, lambda: self._set(address, byte, nbytes))

    # Copies, fills and graphs wait for all kernels in front of them.

    def _move(self, dst: int, src: int, nbytes: int) -> None:
        self._drain()
        ctypes.memmove(dst, src, nbytes)

    def _set(self, address: int, byte: int, nbytes: int) -> None:
        self._drain()
        ctypes.memset(address, byte, nbytes)

    def _drain(self) -> None:
        with self._lock:
            self._runtime.emulated_drain()

    def guard(self, address: int, nbytes: int, *, tensor: bool = False) -> None:
        """Watch `RED_BYTES` before and after a piece of memory from now on, and make its content NaN.

        Args:
            address: where it starts.
            nbytes: how long it is.
            tensor: kernels are given it: until they wait for the kernel in front, what that wrote is hidden.
        """
        with self._lock:
            self._unguard_all()
            ctypes.memset(address, 0xFF, nbytes)
            self._runtime.emulated_guard(address, nbytes, tensor)

    def unguard(self, address: int, nbytes: int) -> None:
        """Watch it no longer; what it held becomes NaN before the next launch. Finalizers may call this."""
        self._unguarded.append((address, nbytes))

    def _unguard_all(self) -> None:
        while self._unguarded:
            address, nbytes = self._unguarded.popleft()
            self._runtime.emulated_unguard(address)
            ctypes.memset(address, 0xFF, nbytes)

    def _new_memory(self, nbytes: int) -> int:
        whole = nbytes + 2 * RED_BYTES + ALIGNMENT
        try:
            storage = (ctypes.c_char * whole)()
        except MemoryError as e:
            raise out_of_memory("cuda:0", nbytes, MemoryInfo(*self.memory_info())) from e
        start = ctypes.addressof(storage) + RED_BYTES
        address = (start + ALIGNMENT - 1) & -ALIGNMENT
        self._memory[address] = _Memory(address, nbytes, storage)
        self.guard(address, nbytes)
        return address

    def _drop_memory(self, address: int) -> int:
        memory = self._memory.pop(address, None)
        if memory is None:
            raise DeviceError(f"cuda:0: {address:#x} is not the address of an allocation")
        with self._lock:
            self.unguard(address, memory.nbytes)
            self._unguard_all()
        return memory.nbytes

    # --- queues and events --------------------------------------------------------------------------------

    def create_stream(self) -> int:
        return self._add(_Queue())

    def synchronize_stream(self, stream: int) -> None:
        if self._get(stream, _Queue).captured is not None:
            raise DeviceError("cuda:0: a queue cannot be waited for while it is captured")
        self._drain()

    def create_event(self, *, timing: bool = False) -> int:
        return self._add(_Event(timing))

    def destroy_event(self, event: int) -> None:
        self._get(event, _Event)
        del self._objects[event]

    def record_event(self, event: int, stream: int) -> None:
        mark = self._get(event, _Event)

        def pass_mark() -> None:
            mark.passed = time.perf_counter()

        self._queue(stream, pass_mark)

    def wait_event(self, stream: int, event: int) -> None:
        self._get(stream, _Queue)
        self._get(event, _Event)

    def synchronize_event(self, event: int) -> None:
        self._get(event, _Event)

    def elapsed_ms(self, start: int, end: int) -> float:
        first, last = self._get(start, _Event), self._get(end, _Event)
        if not (first.timing and last.timing) or first.passed is None or last.passed is None:
            raise DeviceError("cuda:0: an event without timing, or one that was never passed, has no time")
        return (last.passed - first.passed) * 1e3

    # --- graphs -------------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        queue = self._get(stream, _Queue)
        if queue.captured is not None:
            raise DeviceError("cuda:0: this queue is captured already")
        queue.captured = []

    def end_capture(self, stream: int) -> int:
        queue = self._get(stream, _Queue)
        if queue.captured is None:
            raise DeviceError("cuda:0: this queue is not captured")
        work, queue.captured = queue.captured, None
        return self._add(work)

    def launch_graph(self, graph: int, stream: int) -> None:
        captured = self._get(graph, list)
        self._queue(stream, self._drain)
        for work in captured:
            self._queue(stream, work)
        self._queue(stream, self._drain)

    def destroy_graph(self, graph: int) -> None:
        self._get(graph, list)
        del self._objects[graph]

    # --- code ---------------------------------------------------------------------------------------------

    def load(self, code: bytes) -> int:
        with tempfile.NamedTemporaryFile(suffix=".so", prefix="kuiper-emulated-") as file:
            file.write(code)
            file.flush()
            try:
                library = ctypes.CDLL(file.name)
            except OSError as e:
                raise KernelError(f"cuda:0 cannot load a kernel: {e}") from e
        span = (ctypes.c_void_p * 2)()
        library.emulated_shared_range(span)
        start, end = span[0] or 0, span[1] or 0
        return self._add(_Module(library, start, end - start))

    def function(self, module: int, name: str) -> int:
        owner = self._get(module, _Module)
        try:
            entry = getattr(owner.library, f"emulated_entry_{name}")
            describe = getattr(owner.library, f"emulated_describe_{name}")
        except AttributeError:
            raise KernelError(f"cuda:0: the module has no kernel {name}") from None
        facts = (ctypes.c_int * 64)()
        describe(facts)
        sizes = list(itertools.takewhile(bool, facts[2:]))
        address = ctypes.cast(entry, ctypes.c_void_p).value or 0
        free_shared = DEFAULT_SHARED - owner.shared_bytes
        return self._add(_Function(name, owner, address, facts[0], bool(facts[1]), sizes, free_shared))

    def allow_shared(self, function: int, nbytes: int) -> None:
        kernel = self._get(function, _Function)
        if nbytes + kernel.module.shared_bytes > self.chip.max_shared_bytes:
            raise KernelError(
                f"kernel {kernel.name}: {nbytes} bytes of shared memory are more than there are"
            )
        kernel.allowed_shared = nbytes

    def resources(self, function: int) -> Resources:
        return Resources(
            registers=0, spill_bytes=0, shared_bytes=self._get(function, _Function).module.shared_bytes
        )

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        cluster: int,
        overlap: bool,
        stream: int,
        arguments: int,
    ) -> None:
        kernel = self._get(function, _Function)
        self._check_launch(kernel, grid, block, shared_bytes, cluster)
        # Arguments are read now, also if the kernel runs later, in a graph.
        given = (ctypes.c_void_p * len(kernel.sizes)).from_address(arguments) if kernel.sizes else []
        values = [
            ctypes.create_string_buffer(ctypes.string_at(p, n), n)
            for p, n in zip(given, kernel.sizes, strict=True)
        ]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))

        def run() -> None:
            _ = values  # what the pointers point to
            self._run(kernel, grid, block, shared_bytes, pointers)

        self._queue(stream, run)

    def _check_launch(
        self, kernel: _Function, grid: tuple[int, int, int], block: int, shared_bytes: int, cluster: int
    ) -> None:
        what = f"kernel {kernel.name}"
        if cluster != 1:
            raise KernelError(f"{what}: clusters are not emulated")
        if not 1 <= block <= kernel.max_threads:
            raise KernelError(f"{what}: {block} threads, but it is compiled for at most {kernel.max_threads}")
        if not (1 <= grid[0] < 1 << 31 and all(1 <= n < 1 << 16 for n in grid[1:])):
            raise KernelError(f"{what}: a grid of {grid} is not possible")
        if shared_bytes > kernel.allowed_shared:
            raise KernelError(
                f"{what}: {shared_bytes} bytes of dynamic shared memory, {kernel.allowed_shared} are allowed"
            )

    def _run(
        self,
        kernel: _Function,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        pointers: ctypes.Array[ctypes.c_void_p],
    ) -> None:
        with self._lock:
            self._unguard_all()
            failed = self._runtime.emulated_launch(
                kernel.name.encode(),
                kernel.entry,
                pointers,
                *grid,
                block,
                shared_bytes,
                kernel.module.shared_start,
                kernel.module.shared_bytes,
                kernel.chained,
                self.overlaps,
                self.seed,
                self.max_seconds,
                self._message,
                len(self._message),
            )
            if failed:
                raise DeviceError(f"cuda:0: {self._message.value.decode()}")

    def tensor_map(
        self,
        element: str,
        address: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle_bytes: int,
    ) -> bytes:
        raise KernelError("cuda:0: bulk tensor copies are not emulated")

    def can_access_peer(self, index: int) -> bool:
        return False

    # --- handles ------------------------------------------------------------------------------------------

    def _add(self, thing: object) -> int:
        handle = next(self._handles)
        self._objects[handle] = thing
        return handle

    def _get(self, handle: int, kind: type[T]) -> T:
        thing = self._objects.get(handle)
        if not isinstance(thing, kind):
            raise UsageError(f"cuda:0: {handle} is not the handle of a {kind.__name__.strip('_').lower()}")
        return thing

    def _queue(self, stream: int, work: Work) -> None:
        queue = self._get(stream, _Queue)
        if queue.captured is None:
            work()
        else:
            queue.captured.append(work)


def _load_runtime() -> ctypes.CDLL:
    path = build_runtime(Path(settings().cache_dir) / "emulation", EmulatedCompiler().version)
    runtime = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    address, size, unsigned = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    runtime.emulated_launch.argtypes = [
        *(ctypes.c_char_p, address, address, unsigned, unsigned, unsigned, unsigned, unsigned),
        *(address, size, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, address, size),
    ]
    runtime.emulated_guard.argtypes = [address, size, ctypes.c_int]
    runtime.emulated_unguard.argtypes = [address]
    return runtime
