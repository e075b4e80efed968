"""CUDA graphs: work that is recorded once and queued as a whole from then on."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kuiperllm.core.allocator import PrivatePool
from kuiperllm.core.device import Graph
from kuiperllm.core.memory import Buffer
from kuiperllm.core.tensor import Tensor
from kuiperllm.errors import KuiperError

if TYPE_CHECKING:
    from kuiperllm.backends.cuda.backend import CudaBackend


class CudaGraph(Graph):
    """A recorded graph, and the memory that its kernels were given.

    Memory that copies and tensor maps refer to is not known here: whoever replays keeps it.
    """

    def __init__(self, backend: CudaBackend, pool: PrivatePool, stream: int) -> None:
        self.stream = stream
        """The queue that is recorded."""
        self._backend = backend
        self.pool = pool
        """Where the memory of its intermediate results comes from."""
        self._keep: dict[int, Buffer] = {}
        self._handle = 0

    def keep(self, arguments: tuple[object, ...]) -> None:
        """Hold on to the memory of a kernel's tensors. What the graph's own pool gave is safe anyway."""
        for argument in arguments:
            if isinstance(argument, Tensor) and not self.pool.owns(argument.buffer):
                self._keep[id(argument.buffer)] = argument.buffer

    def finish(self, handle: int) -> None:
        """Take over what was recorded."""
        self._handle = handle

    def replay(self) -> None:
        """Queue the recorded work again, on the same memory."""
        self._backend.replay(self._handle)

    def __del__(self) -> None:
        # At the end of the process the driver may be gone already, and the graph with it.
        if self._handle:
            with suppress(KuiperError):
                self._backend.activate()
                self._backend.driver.destroy_graph(self._handle)


class EmptyGraph(Graph):
    """Stands for a graph while kernels are only collected."""

    def replay(self) -> None:
        """Do nothing."""
