"""The device's allocator, with red zones around every buffer, not only around what the driver gives."""

from __future__ import annotations

from collections import deque

from emulation.driver import RED_BYTES, EmulatedDriver
from kuiperllm.core import Device
from kuiperllm.core.allocator import Allocator, _Block, _Lease
from kuiperllm.core.memory import Buffer


class _GuardedLease(_Lease):
    __slots__ = ("address", "driver", "nbytes")

    def __init__(self, block: _Block, returned: deque[_Block], driver: EmulatedDriver, nbytes: int) -> None:
        super().__init__(block, returned)
        self.address = block.address + RED_BYTES
        self.driver = driver
        self.nbytes = nbytes

    def __del__(self) -> None:
        self.driver.unguard(self.address, self.nbytes)
        super().__del__()


class GuardedAllocator(Allocator):
    """New memory is all NaN, so is freed memory, and writes beside a buffer are found after each kernel."""

    def __init__(self, device: Device, driver: EmulatedDriver) -> None:
        super().__init__(device.backend.source, device)
        self._driver = driver

    def allocate(self, nbytes: int) -> Buffer:
        """A buffer between two red zones."""
        if nbytes <= 0:
            return super().allocate(nbytes)
        lease = super().allocate(nbytes + 2 * RED_BYTES).owner()
        assert isinstance(lease, _Lease)
        guarded = _GuardedLease(lease.block, lease.returned, self._driver, nbytes)
        lease.returned = deque()  # from now on the other one returns the block
        self._driver.guard(guarded.address, nbytes, tensor=True)
        return Buffer(guarded, guarded.address, nbytes, self.device)
