"""A CUDA device for machines without one: `Device("cuda:0")` whose kernels run on the processor.

It shows whether kernels compute the right values, whatever the order in which threads happen to run, and stay
inside their memory. It says nothing about speed. It needs g++.

    import emulation          # with tests/ on sys.path
    emulation.install()
    device = Device("cuda:0")
"""

from __future__ import annotations

from emulation.allocator import GuardedAllocator
from emulation.compiler import EmulatedCompiler, gxx
from emulation.driver import EmulatedDriver
from kuiperllm.backends import cuda
from kuiperllm.core import Device

__all__ = ["EmulatedCompiler", "EmulatedDriver", "driver", "gxx", "install", "uninstall"]

_NAMES = ("cuda", "cuda:0")
_opened: list[tuple[Device, EmulatedDriver]] = []
_real: dict[str, Device] = {}
_platforms: list[cuda.Platform] = []


def install() -> Device:
    """Make `Device("cuda:0")` the emulated one; the same each time."""
    if _platforms:
        return _opened[0][0]
    made = _opened[0][1] if _opened else EmulatedDriver()
    _platforms.append(cuda.platform)
    cuda.platform = cuda.Platform(lambda _: made, EmulatedCompiler)
    _real.update({name: Device._known.pop(name) for name in _NAMES if name in Device._known})
    if not _opened:
        device = Device("cuda:0")
        device._allocator = GuardedAllocator(device, made)
        _opened.append((device, made))
    device = _opened[0][0]
    Device._known.update(dict.fromkeys(_NAMES, device))
    return device


def uninstall() -> None:
    """Let the name mean again what it meant before."""
    if _platforms:
        cuda.platform = _platforms.pop()
        for name in _NAMES:
            Device._known.pop(name, None)
        Device._known.update(_real)
        _real.clear()


def driver() -> EmulatedDriver:
    """The driver below the emulated device, for its `seed`."""
    install()
    return _opened[0][1]
