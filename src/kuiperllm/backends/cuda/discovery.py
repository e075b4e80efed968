"""Which GPUs there are, and what keeps them from being used; takes none of them into use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kuiperllm.backends.cuda.nvrtc import INSTALL
from kuiperllm.errors import DeviceError

MIN_COMPUTE_CAPABILITY = (8, 0)
"""What kernels are written for, at least."""


class Bindings(NamedTuple):
    """The modules that this one is written on."""

    core: Any
    """`cuda.core`."""
    driver: Any
    """`cuda.bindings.driver`."""
    version: str
    """The CUDA version that they are for."""


@lru_cache(maxsize=1)
def bindings() -> Bindings:
    """The bindings, imported on first use.

    Raises:
        DeviceError: they are not installed.
    """
    try:
        import cuda.bindings
        import cuda.core
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(f"GPUs need packages that are missing ({error}): {INSTALL}") from None
    return Bindings(cuda.core, driver, cuda.bindings.__version__)


class Gpu(NamedTuple):
    """A GPU that the driver shows."""

    name: str
    total_bytes: int
    compute_capability: tuple[int, int]


def survey() -> tuple[str, list[Gpu]]:
    """The CUDA version of the driver, and the GPUs that it shows; takes none of them into use.

    Raises:
        DeviceError: packages or driver are missing or too old, or there is no GPU.
    """
    _, cu, bindings_version = bindings()
    try:
        version = value(cu.cuDriverGetVersion(), "cannot ask the NVIDIA driver for its version")
    except RuntimeError:
        raise DeviceError(
            "there is no NVIDIA driver (libcuda is not found): install it, nvidia-smi has to list the GPU"
        ) from None
    driver_version = f"{version // 1000}.{version % 1000 // 10}"
    if version // 1000 < int(bindings_version.partition(".")[0]):
        raise DeviceError(
            f"the NVIDIA driver supports CUDA {driver_version}, the installed cuda-bindings are for CUDA "
            f"{bindings_version}: update the driver"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    code = cu.cuInit(0)[0]
    if code == cu.CUresult.CUDA_ERROR_NO_DEVICE:
        raise DeviceError(f"the NVIDIA driver shows no GPU{hint}")
    value((code,), f"the NVIDIA driver (CUDA {driver_version}) does not start")
    return driver_version, [_gpu(cu, i) for i in range(value(cu.cuDeviceGetCount(), "cannot count GPUs"))]


def _gpu(cu: Any, index: int) -> Gpu:
    what = f"cannot ask for the properties of cuda:{index}"
    attribute = cu.CUdevice_attribute
    device = value(cu.cuDeviceGet(index), what)
    name = value(cu.cuDeviceGetName(128, device), what)
    major, minor = (
        value(cu.cuDeviceGetAttribute(part, device), what)
        for part in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    total = int(value(cu.cuDeviceTotalMem(device), what))
    return Gpu(text(name), total, (int(major), int(minor)))


def value(outcome: Sequence[Any], what: str) -> Any:
    """The value of a call of the bindings that is not about one GPU."""
    code, *values = outcome
    if int(code) != 0:
        raise DeviceError(f"{what} ({code.name})")
    return values[0] if len(values) == 1 else values


def text(characters: bytes) -> str:
    """What a call of the bindings wrote into a buffer."""
    return characters.partition(b"\0")[0].decode()
