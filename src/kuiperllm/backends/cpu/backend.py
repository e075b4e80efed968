"""The CPU as a device: work is done when the call returns, and addresses are plain pointers."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from kuiperllm.backends.cpu.memory import HostMemory
from kuiperllm.core.device import Backend, CopyKind, Event, Graph
from kuiperllm.core.dtype import DType
from kuiperllm.core.tensor import Tensor
from kuiperllm.errors import DeviceError


class CpuBackend(Backend):
    """The host's processors and memory."""

    name = "cpu"

    def __init__(self) -> None:
        self.source = HostMemory()

    def copy(self, dst_address: int, src_address: int, nbytes: int, kind: CopyKind) -> None:
        """Copy bytes within the host's memory; they may overlap.

        Raises:
            DeviceError: one end is not on the host.
        """
        if kind is not CopyKind.host_to_host:
            raise DeviceError(f"the CPU back end cannot copy {kind.value}: the other device has to")
        ctypes.memmove(dst_address, src_address, nbytes)

    def copy_strided(
        self,
        dst_address: int,
        dst_strides: Sequence[int],
        src_address: int,
        src_strides: Sequence[int],
        shape: Sequence[int],
        itemsize: int,
    ) -> None:
        """Copy elements between two strided views; they may overlap."""
        dst = np.asarray(_RawArray(dst_address, dst_strides, shape, itemsize))
        np.copyto(dst, np.asarray(_RawArray(src_address, src_strides, shape, itemsize)))

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Set `nbytes` bytes to `byte`."""
        ctypes.memset(address, byte, nbytes)

    def synchronize(self) -> None:
        """Return: every call was done when it returned."""

    def record(self) -> Event:
        """A mark that has been passed: work is done when it is queued."""
        return _PASSED

    def pinned(self, shape: int | Sequence[int], dtype: DType | str) -> tuple[npt.NDArray[Any], Tensor]:
        """Ordinary memory, zeroed."""
        tensor = Tensor.zeros(shape, dtype)
        return tensor.numpy(), tensor

    @property
    def num_threads(self) -> int:
        """Threads that kernels run on, the calling one included."""
        from kuiperllm.backends.cpu.team import num_threads

        return num_threads()

    def read_bandwidth(self) -> float:
        """Bytes per second that all threads together read from memory."""
        from kuiperllm.backends.cpu.bandwidth import read_bandwidth

        return read_bandwidth()

    def set_num_threads(self, num_threads: int) -> None:
        """Use so many threads for kernels, the calling one included."""
        from kuiperllm.backends.cpu.team import set_num_threads

        set_num_threads(num_threads)

    def capture(self, beside: Graph | None = None) -> AbstractContextManager[Graph]:
        """Record the kernels called inside the `with` block; see `Device.capture`."""
        from kuiperllm.backends.cpu.team import CpuGraph, capture

        assert beside is None or isinstance(beside, CpuGraph)
        return capture(beside)

    @property
    def properties(self) -> Mapping[str, object]:
        """Name, architecture, number of logical processors, and the level of the kernels in use."""
        from kuiperllm.backends.cpu.features import processor_name, target

        return {
            "name": processor_name(),
            "level": target().level,
            "architecture": platform.machine(),
            "logical_processors": os.cpu_count() or 1,
        }


class _Passed(Event):
    def wait(self) -> None:
        return


_PASSED = _Passed()


class _RawArray:
    """Shows bare memory to NumPy as an array of unsigned integers (NumPy's array interface, version 3)."""

    def __init__(self, address: int, strides: Sequence[int], shape: Sequence[int], itemsize: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"=u{itemsize}",
            "data": (address, False),
            "shape": tuple(shape),
            "strides": tuple(stride * itemsize for stride in strides),
        }
