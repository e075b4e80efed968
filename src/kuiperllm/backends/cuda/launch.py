"""Kernels as operators see them: a source file, a function in it, template parameters; and launching them.

    _SOURCE = Path(__file__).with_name("cuda.cu")
    _ADD = Kernel(_SOURCE, "add", T=DType.bfloat16)
    launch(_ADD, grid, 256, x, y, out, rows, width)

The types of the arguments are read off the function's signature in the source.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from kuiperllm.backends.cuda import jit
from kuiperllm.backends.cuda.driver import Chip, Driver
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.backends.cuda.sources import parse_signatures, signature
from kuiperllm.core.device import Device
from kuiperllm.core.tensor import Tensor
from kuiperllm.errors import KernelError, UsageError

if TYPE_CHECKING:
    from kuiperllm.backends.cuda.backend import CudaBackend

__all__ = [
    "Argument",
    "Kernel",
    "chip",
    "collecting",
    "compile_all",
    "launch",
    "launch_on",
    "load",
    "parse_signatures",
    "tensor_map",
]

Argument = Tensor | int | float | bytes | None
"""What a kernel takes: a tensor's address (None: no tensor), a number, a tensor map."""

_TENSOR_MAP_BYTES = 128
_MAX_ALIGNMENT = 64
# struct code, bytes, alignment
_SLOTS = {
    "pointer": ("Q", 8, 8),
    "int": ("i", 4, 4),
    "long long": ("q", 8, 8),
    "float": ("f", 4, 4),
    "TensorMap": (f"{_TENSOR_MAP_BYTES}s", _TENSOR_MAP_BYTES, _MAX_ALIGNMENT),
}


def chip(device: Device) -> Chip:
    """Facts about the GPU behind a CUDA device."""
    return _backend(device).driver.chip


def launch(
    kernel: Kernel,
    grid: int | tuple[int, ...],
    block: int,
    *args: Argument,
    shared: int = 0,
    cluster: int = 1,
) -> None:
    """Queue a kernel on the device of the first tensor among its arguments.

    Args:
        kernel: what to run; compiled, or taken from the cache, on first use.
        grid: blocks along x, or along x, y and z; nothing happens if there are none.
        block: threads of a block.
        args: the kernel's parameters in order.
        shared: bytes of dynamic shared memory.
        cluster: blocks of a cluster along x.

    Raises:
        KernelError: the kernel does not compile, the arguments do not fit its signature, or the device
            refuses the launch.
        UsageError: there is no tensor among the arguments.
    """
    for arg in args:
        if type(arg) is Tensor:
            _queue(arg.buffer.device, kernel, grid, block, args, shared, cluster)
            return
    raise UsageError(f"{kernel}: launch() needs a tensor among the arguments, to know the device")


def launch_on(
    device: Device,
    kernel: Kernel,
    grid: int | tuple[int, ...],
    block: int,
    *args: Argument,
    shared: int = 0,
    cluster: int = 1,
) -> None:
    """Like `launch`, on this device: for kernels that are given bare addresses."""
    _queue(device, kernel, grid, block, args, shared, cluster)


def _queue(
    device: Device,
    kernel: Kernel,
    grid: int | tuple[int, ...],
    block: int,
    args: tuple[Argument, ...],
    shared: int,
    cluster: int,
) -> None:
    backend: CudaBackend = device.backend  # type: ignore[assignment]
    if backend.modes and backend.intercepts(kernel, args):
        return
    ready: _Loaded = kernel.loaded.get(device) or load(kernel, device)  # type: ignore[assignment]
    sizes = (grid, 1, 1) if type(grid) is int else (*grid, 1, 1)[:3]  # type: ignore[misc]
    if 0 in sizes:
        return
    if shared > ready.free_shared:
        ready.allow_shared(shared)
    values = [arg.address if type(arg) is Tensor else 0 if arg is None else arg for arg in args]
    driver = backend.driver
    driver.activate()
    with backend.launch_lock:  # one block of memory serves the arguments of all launches of a kernel
        try:
            ready.pack(ready.block, 0, *values)
        except (struct.error, OverflowError):
            raise ready.misfit(args) from None
        driver.launch(
            ready.function, sizes, block, shared, cluster, ready.overlap, backend.stream, ready.arguments
        )


class _Loaded:
    """A kernel on one device: its code, and room for its arguments as the driver reads them."""

    __slots__ = (
        "_driver",
        "_kernel",
        "_pointers",
        "_types",
        "arguments",
        "block",
        "free_shared",
        "function",
        "overlap",
        "pack",
    )

    def __init__(self, kernel: Kernel, driver: Driver, function: int, types: tuple[str, ...]) -> None:
        self._kernel = kernel
        self._driver = driver
        self._types = types
        self.function = function
        self.overlap = driver.chip.has_dependent_launch
        self.free_shared = 0  # a little is asked for, too: the first-level cache gives way to it
        layout, offsets = argument_layout(types)
        self.block = ctypes.create_string_buffer(struct.calcsize(layout) + _MAX_ALIGNMENT)
        start = -ctypes.addressof(self.block) % _MAX_ALIGNMENT
        address = ctypes.addressof(self.block) + start
        self.pack: Callable[..., None] = struct.Struct(f"={start}x{layout[1:]}").pack_into
        self._pointers = (ctypes.c_void_p * len(types))(*(address + offset for offset in offsets))
        self.arguments = ctypes.addressof(self._pointers)

    def allow_shared(self, nbytes: int) -> None:
        """Let launches have so much dynamic shared memory."""
        self._driver.allow_shared(self.function, nbytes)
        self.free_shared = nbytes

    def misfit(self, args: tuple[Argument, ...]) -> KernelError:
        """Says which argument does not fit."""
        if len(args) != len(self._types):
            return KernelError(f"{self._kernel} takes {len(self._types)} arguments, not {len(args)}")
        for index, (kind, arg) in enumerate(zip(self._types, args, strict=True), 1):
            value = arg.address if isinstance(arg, Tensor) else 0 if arg is None else arg
            try:
                struct.pack(_SLOTS[kind][0], value)
            except (struct.error, OverflowError):
                return KernelError(f"{self._kernel}: argument {index} is {arg!r}, which is no {kind}")
        return KernelError(f"{self._kernel}: the arguments do not fit {', '.join(self._types)}")


def argument_layout(types: Iterable[str]) -> tuple[str, list[int]]:
    """How arguments lie in memory, each aligned for its type: a `struct` format, and where each begins."""
    layout, offsets, end = "=", [], 0
    for kind in types:
        code, size, alignment = _SLOTS[kind]
        gap = -end % alignment
        layout += f"{gap}x{code}" if gap else code
        offsets.append(end + gap)
        end += gap + size
    return layout, offsets


def load(kernel: Kernel, device: Device) -> _Loaded:
    """Make a kernel ready on a device now, rather than when it is first launched.

    Raises:
        KernelError: it does not compile, or the driver refuses it.
    """
    if (ready := kernel.loaded.get(device)) is not None:
        return ready  # type: ignore[return-value]
    backend = _backend(device)
    types = signature(kernel.source, kernel.name)
    entry = jit.binary(kernel, backend.driver.chip.arch)
    backend.activate()
    function = backend.driver.function(backend.driver.load(entry.code), kernel.name)
    ready = _Loaded(kernel, backend.driver, function, types)
    kernel.loaded[device] = ready
    return ready


def _backend(device: Device) -> CudaBackend:
    return cast("CudaBackend", device.backend)


# --- compiling ahead --------------------------------------------------------------------------------------


@contextmanager
def collecting(device: Device) -> Iterator[dict[Kernel, None]]:
    """Find out which kernels the code inside the `with` block needs: none is run, none is compiled.

    For the calling thread, launches, copies, fills, captures and replays on the device do nothing; copies to
    the host give zeros. Memory is allocated as ever.

    Yields:
        The kernels, in the order of their first launch; give them to `compile_all`.
    """
    kernels: dict[Kernel, None] = {}
    with _backend(device).collecting(kernels):
        yield kernels


def compile_all(
    kernels: Iterable[Kernel], device: Device, progress: Callable[[int, int], None] | None = None
) -> int:
    """Compile those of the kernels that the cache lacks, on all processors at once.

    Args:
        kernels: such as `collecting` finds.
        device: what for.
        progress: called with how many are done, of how many.

    Returns:
        How many had to be compiled.

    Raises:
        KernelError: one does not compile.
    """
    return jit.compile_all(kernels, chip(device).arch, progress)


# --- tensor maps ------------------------------------------------------------------------------------------


def tensor_map(
    source: Tensor | int,
    element: str,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 0,
    *,
    device: Device | None = None,
) -> bytes:
    """What describes a tensor to the bulk copy engine: an argument for a `TensorMap` parameter.

    Equal requests are answered from memory, the last few thousand of them.

    Args:
        source: the first element: a tensor, or an address on `device`; 16-byte aligned.
        element: `float32`, `float16`, `bfloat16`, `uint8`.
        sizes: elements along each axis, innermost first.
        strides: bytes between elements of each axis but the innermost, multiples of 16.
        box: the tile that one copy fetches, in elements, innermost first.
        swizzle: bytes of the pattern that tiles are swizzled with in shared memory: 0, 32, 64 or 128.
        device: where an address lies.

    Raises:
        KernelError: the driver refuses the description.
        UsageError: an address comes without its device.
    """
    if isinstance(source, Tensor):
        driver, address = _backend(source.device).driver, source.address
    elif device is not None:
        driver, address = _backend(device).driver, source
    else:
        raise UsageError("tensor_map() of an address needs its device")
    return _encoded(driver, element, address, sizes, strides, box, swizzle)


@lru_cache(maxsize=8192)
def _encoded(
    driver: Driver,
    element: str,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    return driver.tensor_map(element, address, sizes, strides, box, swizzle)
