"""The CUDA back end: NVIDIA GPUs of compute capability 8.0 and later, kernels compiled at run time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kuiperllm.errors import DeviceError

if TYPE_CHECKING:
    from kuiperllm.backends.cuda.driver import Compiler, Driver
    from kuiperllm.core.device import Backend


def _open_nvidia_driver(index: int) -> Driver:
    from kuiperllm.backends.cuda.nvidia import NvidiaDriver

    return NvidiaDriver(index)


def _open_nvidia_compiler() -> Compiler:
    from kuiperllm.backends.cuda.nvrtc import NvidiaCompiler

    return NvidiaCompiler()


@dataclass
class Platform:
    """Where GPUs and code for them come from."""

    open_driver: Callable[[int], Driver] = _open_nvidia_driver
    """The GPU with this index, or a `DeviceError`."""
    open_compiler: Callable[[], Compiler] = _open_nvidia_compiler
    """The compiler, or a `DeviceError`."""


platform = Platform()
"""The platform in use. Tests put one here that runs kernels on a processor."""


def create(index: int) -> Backend:
    """The back end of `Device("cuda:<index>")`.

    Raises:
        DeviceError: there is no such GPU, or it cannot be used; the message says what to do.
    """
    from kuiperllm.backends.cuda.backend import CudaBackend

    try:
        driver = platform.open_driver(index)
    except DeviceError as error:
        raise DeviceError(f'device "cuda:{index}": {error}') from None
    return CudaBackend(index, driver)
