"""What this back end asks of the CUDA driver and of the run-time compiler, and nothing more.

`Driver` is the interface; `nvidia.py` answers it with `cuda.core` and `cuda.bindings`. Everything above works
with plain integers: addresses, and handles of streams, events, graphs, modules and functions. That keeps the
rest of the back end independent of the binding library, and lets tests run every kernel on a processor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chip:
    """What kernels and people want to know about one GPU."""

    name: str
    compute_capability: tuple[int, int]
    arch: str
    """What kernels are compiled for: `sm_90a`, `sm_80`, ..."""
    multiprocessors: int
    max_shared_bytes: int
    """Most shared memory that a block may have (dynamic, opted in)."""
    shared_bytes_per_multiprocessor: int
    l2_bytes: int
    total_bytes: int
    pci_bus_id: str
    driver_version: str
    """The CUDA version that the driver supports, such as "13.0"."""

    @property
    def is_hopper(self) -> bool:
        """Whether the chip has the bulk tensor copy engine together with `wgmma` (9.0 only)."""
        return self.compute_capability == (9, 0)

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may start before the one in front of it has ended (9.0 and later)."""
        return self.compute_capability >= (9, 0)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes, for each thread or block."""

    registers: int
    spill_bytes: int
    """Local memory of a thread."""
    shared_bytes: int
    """Static shared memory of a block."""


class Driver(ABC):
    """One GPU: memory, queues, graphs and code. Every method raises a `KuiperError` with one clear line."""

    chip: Chip

    @abstractmethod
    def activate(self) -> None:
        """Make this GPU the one that calls of the present thread mean; cheap if it is already."""

    # --- memory -------------------------------------------------------------------------------------------

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Device memory, 512-byte aligned.

        Raises:
            OutOfMemoryError: there is not that much left.
        """

    @abstractmethod
    def free(self, address: int) -> None:
        """Give back what `allocate` returned, once all queued work is done."""

    @abstractmethod
    def allocate_host(self, nbytes: int) -> int:
        """Page-locked host memory that the GPU reads and writes at the same address."""

    @abstractmethod
    def free_host(self, address: int) -> None:
        """Give back what `allocate_host` returned."""

    @abstractmethod
    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes."""

    @abstractmethod
    def copy(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Queue a copy between any two addresses, host or device."""

    @abstractmethod
    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        """Queue setting device memory to a byte."""

    # --- queues and events --------------------------------------------------------------------------------

    @abstractmethod
    def create_stream(self) -> int:
        """A queue that does not wait for the legacy default one."""

    @abstractmethod
    def synchronize_stream(self, stream: int) -> None:
        """Wait until everything queued so far is done; a kernel's failure comes out here."""

    @abstractmethod
    def create_event(self, *, timing: bool = False) -> int:
        """A mark that can be put into queues."""

    @abstractmethod
    def destroy_event(self, event: int) -> None:
        """Give up an event."""

    @abstractmethod
    def record_event(self, event: int, stream: int) -> None:
        """Put the mark behind what is queued."""

    @abstractmethod
    def wait_event(self, stream: int, event: int) -> None:
        """Let a queue wait for a mark."""

    @abstractmethod
    def synchronize_event(self, event: int) -> None:
        """Let the host wait for a mark."""

    @abstractmethod
    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two timing marks that have been passed."""

    # --- graphs -------------------------------------------------------------------------------------------

    @abstractmethod
    def begin_capture(self, stream: int) -> None:
        """Record what is queued from now on instead of running it."""

    @abstractmethod
    def end_capture(self, stream: int) -> int:
        """The recorded graph, ready to be launched."""

    @abstractmethod
    def launch_graph(self, graph: int, stream: int) -> None:
        """Queue a graph."""

    @abstractmethod
    def destroy_graph(self, graph: int) -> None:
        """Give up a graph."""

    # --- code ---------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, code: bytes) -> int:
        """A module from a cubin.

        Raises:
            KernelError: the driver refuses it.
        """

    @abstractmethod
    def function(self, module: int, name: str) -> int:
        """An `extern "C"` kernel of a module."""

    @abstractmethod
    def allow_shared(self, function: int, nbytes: int) -> None:
        """Let a kernel be launched with so much dynamic shared memory, and prefer shared memory to cache."""

    @abstractmethod
    def resources(self, function: int) -> Resources:
        """What a kernel takes."""

    @abstractmethod
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
        """Queue a kernel.

        Args:
            function: what `function` returned.
            grid: blocks along x, y and z.
            block: threads of a block.
            shared_bytes: dynamic shared memory of a block.
            cluster: blocks of a cluster along x; 1: no clusters.
            overlap: the kernel may start before the one in front of it has ended (programmatic dependent
                launch); it waits for it by itself.
            stream: the queue.
            arguments: address of an array of pointers to the arguments.
        """

    @abstractmethod
    def tensor_map(
        self,
        element: str,
        address: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle_bytes: int,
    ) -> bytes:
        """The 128 bytes that describe a tensor to the bulk copy engine (`cuTensorMapEncodeTiled`).

        Args:
            element: `float32`, `float16`, `bfloat16`, `uint8`.
            address: first element, 16-byte aligned.
            sizes: elements along each axis, innermost first.
            strides: bytes between elements of each axis but the innermost, multiples of 16.
            box: the tile, in elements, innermost first.
            swizzle_bytes: 0, 32, 64 or 128.
        """

    # --- other GPUs ---------------------------------------------------------------------------------------

    @abstractmethod
    def can_access_peer(self, index: int) -> bool:
        """Whether this GPU can read the memory of GPU `index` directly."""

    def share_with(self, index: int) -> None:  # noqa: B027 - copies work without, by way of the host
        """Let GPU `index` read and write the memory of this one directly, if it can."""


class Compiler(ABC):
    """Turns CUDA C++ into code for one chip; needs no GPU."""

    version: str
    """Part of the key of the kernel cache."""

    @abstractmethod
    def compile(self, source: str, name: str, arch: str) -> tuple[bytes, str]:
        """Code, and what the compiler had to say (resource use, warnings).

        Raises:
            KernelError: the source does not compile; the message quotes the compiler and the line.
        """
