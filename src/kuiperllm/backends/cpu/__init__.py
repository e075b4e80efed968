"""The CPU back end: host memory, threads and the tools that its kernels are built with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuiperllm.errors import DeviceError

if TYPE_CHECKING:
    from kuiperllm.core.device import Backend


def create(index: int) -> Backend:
    """The back end of `Device("cpu")`.

    Raises:
        DeviceError: the index is not 0; all processors of the host are one device.
    """
    from kuiperllm.backends.cpu.backend import CpuBackend

    if index != 0:
        raise DeviceError(f'there is no device "cpu:{index}": all processors together are the device "cpu"')
    return CpuBackend()
