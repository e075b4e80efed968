"""Captured passes share the memory of their intermediate results: no two of them run at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kuiperllm.core import Device
from kuiperllm.core.device import Graph


class Graphs:
    """Captures work in such a way that every graph may overwrite what the one replayed before it has left.

    Args:
        device: what is recorded.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._another: Graph | None = None

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is called inside the `with` block."""
        with self._device.capture(self._another) as graph:
            yield graph
        self._another = graph

    def clear(self) -> None:
        """Let the next graph have memory of its own, so that this one's goes when its graphs do."""
        self._another = None
