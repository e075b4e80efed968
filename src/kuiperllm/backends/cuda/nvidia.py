"""NVIDIA's driver, by way of `cuda.core` and `cuda.bindings`.

`cuda.core` owns the context, the streams and the memory. What is called for every kernel goes to the driver
library directly through ctypes, without giving up the interpreter lock: a launch takes two microseconds, but
a thread that gives up the lock may wait milliseconds to get it back. Calls that wait for the GPU give it up.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kuiperllm.backends.cuda.discovery import MIN_COMPUTE_CAPABILITY, Gpu, bindings, survey, text
from kuiperllm.backends.cuda.driver import Chip, Driver, Resources
from kuiperllm.core.memory import MemoryInfo, format_bytes, out_of_memory
from kuiperllm.errors import DeviceError, KernelError, KuiperError

_LIBRARY = "libcuda.so.1"

# After one of these the context is of no use any more.
_LOST = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "HARDWARE_STACK_ERROR",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "ASSERT",
        "ECC_UNCORRECTABLE",
        "CONTEXT_IS_DESTROYED",
    )
)
_REFUSED_CODE = frozenset(
    f"CUDA_ERROR_{name}"
    for name in ("UNSUPPORTED_PTX_VERSION", "NO_BINARY_FOR_GPU", "INVALID_IMAGE", "INVALID_SOURCE")
)

# CUlaunchConfig: grid, block, shared bytes, (padding,) stream, attributes, their number.
_CONFIG = struct.Struct("@7IPPI4x")
# CUlaunchAttribute: id, padding, value.
_ATTRIBUTE = struct.Struct("@I4x3I52x")
_CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 4, 6


class _Current(threading.local):
    """The GPU that calls of this thread mean."""

    driver: NvidiaDriver | None = None


_current = _Current()


class NvidiaDriver(Driver):
    """One NVIDIA GPU.

    Raises:
        DeviceError: there is no such GPU, or it cannot be used; the message says why and what to do.
    """

    def __init__(self, index: int) -> None:
        driver_version, gpus = survey()
        self._core, self._cu, self._bindings_version = bindings()
        self._name = f"cuda:{index}"
        if index >= len(gpus):
            there = ", ".join(f'"cuda:{i}" ({gpu.name})' for i, gpu in enumerate(gpus))
            raise DeviceError(f"there is no such GPU; there are {there}")
        gpu = gpus[index]
        if gpu.compute_capability < MIN_COMPUTE_CAPABILITY:
            raise DeviceError(
                "{} has compute capability {}.{}, and {}.{} or later is needed: use another device".format(
                    gpu.name, *gpu.compute_capability, *MIN_COMPUTE_CAPABILITY
                )
            )
        with self._explained("cannot be used"):
            self._device = self._core.Device(index)
            self._device.set_current()
            self.chip = self._describe(gpu, driver_version)
            # A queue of its own lets memory be reserved while others are being recorded.
            self._memory_stream = self._new_stream()
            self._memory = self._memory_resource()
            self._host_memory = self._core.LegacyPinnedMemoryResource()
        _current.driver = self
        self._functions = _Functions()
        self._blocks: dict[int, Any] = {}
        self._host_blocks: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._recording: set[int] = set()
        self._shared_with: set[int] = set()
        self._attributes: dict[tuple[int, bool], tuple[int, int]] = {}
        self._keep: list[object] = []

    def _describe(self, gpu: Gpu, driver_version: str) -> Chip:
        properties = self._device.properties
        major, minor = gpu.compute_capability
        return Chip(
            name=gpu.name,
            compute_capability=gpu.compute_capability,
            # The `a` variant has instructions of this chip alone: wgmma.
            arch=f"sm_{major}{minor}a" if (major, minor) == (9, 0) else f"sm_{major}{minor}",
            multiprocessors=properties.multiprocessor_count,
            max_shared_bytes=properties.max_shared_memory_per_block_optin,
            shared_bytes_per_multiprocessor=properties.max_shared_memory_per_multiprocessor,
            l2_bytes=properties.l2_cache_size,
            total_bytes=gpu.total_bytes,
            pci_bus_id=text(
                self._call(self._cu.cuDeviceGetPCIBusId(32, self._device.device_id), "no PCI bus id")
            ),
            driver_version=driver_version,
        )

    def _new_stream(self) -> Any:
        return self._device.create_stream(options=self._core.StreamOptions(nonblocking=True))

    def _memory_resource(self) -> Any:
        """A pool of our own that keeps nothing: what is freed goes back to the GPU at the next wait.

        The allocator caches; the default pool of a device would cache a second time. GPUs without memory
        pools (some virtual ones) have a resource that allocates directly.
        """
        if self._device.properties.memory_pools_supported:
            return self._core.DeviceMemoryResource(self._device, self._core.DeviceMemoryResourceOptions())
        return self._device.memory_resource

    def activate(self) -> None:
        """Make this GPU the one that calls of the present thread mean."""
        if _current.driver is not self:
            self._device.set_current()
            _current.driver = self

    # --- memory -------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """Device memory, ready for use by every queue."""
        with self._explained("cannot allocate memory", nbytes):
            block = self._memory.allocate(nbytes, stream=self._memory_stream)
            self._memory_stream.sync()
        address = int(block.handle)
        self._blocks[address] = block
        return address

    def free(self, address: int) -> None:
        """Wait for all queues, then give memory back."""
        for stream in list(self._streams):
            if stream not in self._recording:
                self.synchronize_stream(stream)
        with self._explained("cannot free memory"):
            self._blocks.pop(address).close(self._memory_stream)
            self._memory_stream.sync()

    def allocate_host(self, nbytes: int) -> int:
        """Page-locked host memory; every GPU sees it at the same address."""
        try:
            block = self._host_memory.allocate(nbytes)
        except Exception as error:  # cuda.core's own has no public name
            raise DeviceError(
                f"cannot page-lock {format_bytes(nbytes)} of the host's memory for {self._name} "
                f"({_error_name(error)}): free some memory or raise the limit (ulimit -l)"
            ) from None
        address = int(block.handle)
        self._host_blocks[address] = block
        return address

    def free_host(self, address: int) -> None:
        """Give host memory back."""
        with self._explained("cannot free host memory"):
            self._host_blocks.pop(address).close()

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = self._call(self._cu.cuMemGetInfo(), "cannot ask for free memory")
        return int(free), int(total)

    def copy(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Queue a copy between any two addresses."""
        if code := self._functions.copy(dst, src, nbytes, stream):
            raise self._failure(code, f"cannot copy {format_bytes(nbytes)}")

    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        """Queue setting device memory to a byte."""
        if code := self._functions.fill(address, byte, nbytes, stream):
            raise self._failure(code, f"cannot fill {format_bytes(nbytes)}")

    # --- queues and events --------------------------------------------------------------------------------

    def create_stream(self) -> int:
        """A queue that does not wait for the legacy default one."""
        with self._explained("cannot create a stream"):
            stream = self._new_stream()
        handle = int(stream.handle)
        self._streams[handle] = stream
        return handle

    def synchronize_stream(self, stream: int) -> None:
        """Wait until everything queued so far is done."""
        if code := self._functions.synchronize_stream(stream):
            raise self._failure(code, "queued work failed")

    def create_event(self, *, timing: bool = False) -> int:
        """A mark that can be put into queues."""
        flags = self._cu.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        return int(self._call(self._cu.cuEventCreate(flag), "cannot create an event"))

    def destroy_event(self, event: int) -> None:
        """Give up an event."""
        self._call(self._cu.cuEventDestroy(event), "cannot destroy an event")

    def record_event(self, event: int, stream: int) -> None:
        """Put the mark behind what is queued."""
        if code := self._functions.record_event(event, stream):
            raise self._failure(code, "cannot record an event")

    def wait_event(self, stream: int, event: int) -> None:
        """Let a queue wait for a mark."""
        if code := self._functions.wait_event(stream, event, 0):
            raise self._failure(code, "cannot wait for an event")

    def synchronize_event(self, event: int) -> None:
        """Let the host wait for a mark."""
        if code := self._functions.synchronize_event(event):
            raise self._failure(code, "queued work failed")

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two timing marks."""
        return float(self._call(self._cu.cuEventElapsedTime(start, end), "cannot compare events"))

    # --- graphs -------------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        """Record what is queued; memory may be allocated and modules loaded meanwhile."""
        mode = self._cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call(self._cu.cuStreamBeginCapture(stream, mode), "cannot record a graph")
        self._recording.add(stream)

    def end_capture(self, stream: int) -> int:
        """The recorded graph, ready to be launched."""
        self._recording.discard(stream)
        graph = self._call(self._cu.cuStreamEndCapture(stream), "cannot record a graph")
        try:
            return int(self._call(self._cu.cuGraphInstantiate(graph, 0), "cannot instantiate a graph"))
        finally:
            self._cu.cuGraphDestroy(graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        """Queue a graph."""
        if code := self._functions.launch_graph(graph, stream):
            raise self._failure(code, "cannot launch a graph")

    def destroy_graph(self, graph: int) -> None:
        """Give up a graph."""
        self._call(self._cu.cuGraphExecDestroy(graph), "cannot destroy a graph")

    # --- code ---------------------------------------------------------------------------------------------

    def load(self, code: bytes) -> int:
        """A module from a cubin."""
        outcome = self._cu.cuModuleLoadData(code)
        if outcome[0].name in _REFUSED_CODE:
            compiled = f"code for {self.chip.arch} compiled with CUDA {self._bindings_version}"
            raise KernelError(
                f"{self._name}: the driver (CUDA {self.chip.driver_version}) refuses {compiled} "
                f"({outcome[0].name}): update the driver"
            )
        return int(self._call(outcome, "cannot load a kernel"))

    def function(self, module: int, name: str) -> int:
        """A kernel of a module."""
        return int(self._call(self._cu.cuModuleGetFunction(module, name.encode()), f"no kernel {name}"))

    def allow_shared(self, function: int, nbytes: int) -> None:
        """Let a kernel have so much dynamic shared memory, and all of the first-level cache as that."""
        if nbytes > self.chip.max_shared_bytes:
            raise KernelError(
                f"a kernel wants {format_bytes(nbytes)} of shared memory, a block on {self._name} can have "
                f"{format_bytes(self.chip.max_shared_bytes)}"
            )
        attribute = self._cu.CUfunction_attribute
        for name, value in (
            (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, nbytes),
            (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ):
            self._call(
                self._cu.cuFuncSetAttribute(function, name, value), "cannot give a kernel shared memory"
            )

    def resources(self, function: int) -> Resources:
        """What a kernel takes."""
        attribute = self._cu.CUfunction_attribute
        return Resources(
            *(
                int(self._call(self._cu.cuFuncGetAttribute(name, function), "cannot ask about a kernel"))
                for name in (
                    attribute.CU_FUNC_ATTRIBUTE_NUM_REGS,
                    attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
                    attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                )
            )
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
        """Queue a kernel."""
        attributes = self._attributes.get((cluster, overlap)) or self._launch_attributes(cluster, overlap)
        try:
            config = _CONFIG.pack(*grid, block, 1, 1, shared_bytes, stream, *attributes)
        except struct.error:
            raise KernelError(f"cannot launch {grid} blocks of {block} threads: out of range") from None
        if code := self._functions.launch(config, function, arguments, None):
            raise self._failure(
                code,
                f"cannot launch {grid} blocks of {block} threads with {format_bytes(shared_bytes)} of shared "
                f"memory in clusters of {cluster}",
                KernelError,
            )

    def _launch_attributes(self, cluster: int, overlap: bool) -> tuple[int, int]:
        """Address and number of the attributes of a launch."""
        packed = b""
        if cluster > 1:
            packed += _ATTRIBUTE.pack(_CLUSTER_DIMENSION, cluster, 1, 1)
        if overlap:
            packed += _ATTRIBUTE.pack(_PROGRAMMATIC_SERIALIZATION, 1, 0, 0)
        memory = ctypes.create_string_buffer(packed, len(packed) or 1)
        self._keep.append(memory)
        attributes = (ctypes.addressof(memory), len(packed) // _ATTRIBUTE.size)
        self._attributes[cluster, overlap] = attributes
        return attributes

    def tensor_map(
        self,
        element: str,
        address: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle_bytes: int,
    ) -> bytes:
        """The 128 bytes that describe a tensor to the bulk copy engine."""
        cu = self._cu
        elements, swizzles = cu.CUtensorMapDataType, cu.CUtensorMapSwizzle
        outcome = cu.cuTensorMapEncodeTiled(
            getattr(elements, f"CU_TENSOR_MAP_DATA_TYPE_{element.upper()}"),
            len(sizes),
            address,
            [cu.cuuint64_t(size) for size in sizes],
            [cu.cuuint64_t(stride) for stride in strides],
            [cu.cuuint32_t(size) for size in box],
            [cu.cuuint32_t(1)] * len(sizes),
            cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(
                swizzles,
                f"CU_TENSOR_MAP_SWIZZLE_{swizzle_bytes}B" if swizzle_bytes else "CU_TENSOR_MAP_SWIZZLE_NONE",
            ),
            cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        what = f"no tensor map: {element}, {sizes=}, {strides=}, {box=}, {swizzle_bytes=}"
        return ctypes.string_at(self._call(outcome, what, KernelError).getPtr(), 128)

    # --- other GPUs ---------------------------------------------------------------------------------------

    def can_access_peer(self, index: int) -> bool:
        """Whether this GPU can read the memory of GPU `index` directly."""
        return self._can_access(self._device.device_id, index)

    def share_with(self, index: int) -> None:
        """Let GPU `index` read and write the memory of this one directly, if it can."""
        if index in self._shared_with:
            return
        self._shared_with.add(index)
        if self._can_access(index, self._device.device_id) and hasattr(self._memory, "peer_accessible_by"):
            with self._explained(f"cannot share memory with cuda:{index}"):
                self._memory.peer_accessible_by = sorted(self._shared_with)

    def _can_access(self, index: int, peer: int) -> bool:
        return bool(self._call(self._cu.cuDeviceCanAccessPeer(index, peer), "cannot ask about other GPUs"))

    # --- errors -------------------------------------------------------------------------------------------

    def _call(self, outcome: Sequence[Any], what: str, kind: type[KuiperError] = DeviceError) -> Any:
        """The value of a call of the bindings; an error if it failed."""
        code, *values = outcome
        if int(code) != 0:
            raise self._failure(int(code), what, kind)
        return values[0] if len(values) == 1 else values

    def _failure(self, code: int, what: str, kind: type[KuiperError] = DeviceError) -> KuiperError:
        return _explain(self._name, self._cu.CUresult(code).name, what, kind)

    @contextmanager
    def _explained(self, what: str, nbytes: int = 0) -> Iterator[None]:
        """Turn an error of `cuda.core` into one of ours."""
        try:
            yield
        except Exception as error:  # cuda.core's own has no public name
            name = _error_name(error)
            if name == "CUDA_ERROR_OUT_OF_MEMORY" and nbytes:
                raise out_of_memory(self._name, nbytes, MemoryInfo(*self.memory_info())) from None
            raise _explain(self._name, name, what, DeviceError) from None


class _Functions:
    """Entry points of the driver library, as ctypes calls them."""

    def __init__(self) -> None:
        quick, waiting = ctypes.PyDLL(_LIBRARY), ctypes.CDLL(_LIBRARY)
        word, handle = ctypes.c_size_t, ctypes.c_void_p
        self.launch = _entry(quick, "cuLaunchKernelEx", ctypes.c_char_p, handle, handle, handle)
        self.launch_graph = _entry(quick, "cuGraphLaunch", handle, handle)
        self.copy = _entry(quick, "cuMemcpyAsync", word, word, word, handle)
        self.fill = _entry(quick, "cuMemsetD8Async", word, ctypes.c_ubyte, word, handle)
        self.record_event = _entry(quick, "cuEventRecord", handle, handle)
        self.wait_event = _entry(quick, "cuStreamWaitEvent", handle, handle, ctypes.c_uint)
        self.synchronize_stream = _entry(waiting, "cuStreamSynchronize", handle)
        self.synchronize_event = _entry(waiting, "cuEventSynchronize", handle)


def _entry(library: ctypes.CDLL, name: str, *types: Any) -> Callable[..., int]:
    function = library[name]
    function.argtypes = types
    function.restype = ctypes.c_int
    return function


def _error_name(error: Exception) -> str:
    """The driver's name for an error that `cuda.core` raised, or else its first line."""
    found = re.search(r"CUDA_ERROR_\w+", str(error))
    return found[0] if found else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _explain(device: str, name: str, what: str, kind: type[KuiperError]) -> KuiperError:
    if name in _LOST:
        return DeviceError(f"{device}: a kernel failed ({name}); the GPU is lost to this process, restart it")
    return kind(f"{device}: {what} ({name})")
