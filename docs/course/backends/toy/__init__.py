"""A device for experiments: the host's memory behind a border that only copies cross."""

from __future__ import annotations

import ctypes
from collections import Counter
from contextlib import AbstractContextManager

from kuiperllm.backends.cpu.backend import CpuBackend
from kuiperllm.core.device import CopyKind, Graph
from kuiperllm.errors import DeviceError


class ToyBackend(CpuBackend):
    """Work is done when a call returns, as on the CPU; copies to and from the host are counted."""

    name = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.copied: Counter[CopyKind] = Counter()
        """Bytes by the kind of copy."""

    def copy(self, dst_address: int, src_address: int, nbytes: int, kind: CopyKind) -> None:
        """Copy bytes in any direction."""
        self.copied[kind] += nbytes
        ctypes.memmove(dst_address, src_address, nbytes)

    def capture(self, beside: Graph | None = None) -> AbstractContextManager[Graph]:
        """Refuse: nothing is launched here that could be recorded.

        Raises:
            DeviceError: always.
        """
        raise DeviceError("the toy back end records no graphs; run the operators one by one")


def create(index: int) -> ToyBackend:
    """The back end of `Device("toy:0")`.

    Raises:
        DeviceError: the index is not 0.
    """
    if index != 0:
        raise DeviceError(f'there is no device "toy:{index}": there is one toy, "toy:0"')
    return ToyBackend()
