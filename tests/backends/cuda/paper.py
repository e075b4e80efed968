"""GPUs on paper: every fact about a chip, addresses without memory, nothing that could run.

Operators called inside `collecting()` on such a device choose their kernels as they would on the real chip.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kuiperllm.backends import cuda
from kuiperllm.backends.cuda.driver import Chip, Driver
from kuiperllm.core import Device

_GIB = 1 << 30


def _chip(name: str, capability: tuple[int, int], count: int, block: int, total: int, l2: int) -> Chip:
    suffix = "a" if capability == (9, 0) else ""
    return Chip(
        name=name,
        compute_capability=capability,
        arch="sm_{}{}{}".format(*capability, suffix),
        multiprocessors=count,
        max_shared_bytes=block,
        shared_bytes_per_multiprocessor=block + 1024,
        l2_bytes=l2 << 20,
        total_bytes=total * _GIB,
        pci_bus_id="0000:00:00.0",
        driver_version="13.0",
    )


CHIPS = {
    chip.arch: chip
    for chip in (
        _chip("A100", (8, 0), 108, 166_912, 80, 40),
        _chip("RTX 3090", (8, 6), 82, 101_376, 24, 6),
        _chip("RTX 4090", (8, 9), 128, 101_376, 24, 72),
        _chip("H200", (9, 0), 132, 232_448, 141, 50),
        _chip("B200", (10, 0), 148, 232_448, 180, 126),
        _chip("RTX 5090", (12, 0), 170, 101_376, 32, 96),
    )
}


class PaperDriver(Driver):
    """Hands out addresses and forgets everything else that it is told."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self._next = 1 << 40
        self._handles = itertools.count(1)

    def activate(self) -> None:
        pass

    def allocate(self, nbytes: int) -> int:
        address = self._next
        self._next += (nbytes + 4095) & -4096
        return address

    def memory_info(self) -> tuple[int, int]:
        return self.chip.total_bytes, self.chip.total_bytes

    def create_stream(self) -> int:
        return next(self._handles)

    def create_event(self, *, timing: bool = False) -> int:
        return next(self._handles)

    def tensor_map(self, *description: Any) -> bytes:
        return bytes(128)

    def can_access_peer(self, index: int) -> bool:
        return False

    def _nothing(self, *given: Any, **named: Any) -> None:
        pass

    free = free_host = fill = copy = synchronize_stream = destroy_event = _nothing  # type: ignore[assignment]
    record_event = wait_event = synchronize_event = destroy_graph = _nothing  # type: ignore[assignment]

    def _refuse(self, *given: Any, **named: Any) -> Any:
        raise AssertionError("a GPU on paper cannot run anything")

    allocate_host = elapsed_ms = begin_capture = end_capture = launch_graph = _refuse  # type: ignore[assignment]
    load = function = allow_shared = resources = launch = _refuse  # type: ignore[assignment]


@contextmanager
def paper_gpus() -> Iterator[dict[str, Device]]:
    """Inside the block, `Device("cuda:0")`, `Device("cuda:1")` ... are these chips; yields them by name."""
    chips = list(CHIPS.values())
    names = ["cuda", *(f"cuda:{index}" for index in range(len(chips)))]
    platform, before = (
        cuda.platform,
        {name: Device._known.pop(name) for name in names if name in Device._known},
    )
    cuda.platform = cuda.Platform(lambda index: PaperDriver(chips[index]), platform.open_compiler)
    try:
        yield {chip.arch: Device(f"cuda:{index}") for index, chip in enumerate(chips)}
    finally:
        cuda.platform = platform
        for name in names:
            Device._known.pop(name, None)
        Device._known.update(before)
