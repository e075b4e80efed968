"""A function of tensors that is captured once for each combination of shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.core.device import Graph

Key = tuple[tuple[tuple[int, ...], DType], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    inputs: list[Tensor]
    graph: Graph
    output: Tensor


class Captured:
    """Calls `function` by replaying a graph.

    The result lies in the graph's memory: the next call with the same shapes overwrites it.

    Args:
        function: makes one tensor of some others, by operators alone.
        device: of all tensors.
    """

    def __init__(self, function: Callable[..., Tensor], device: Device) -> None:
        self._function = function
        self._device = device
        self._known: dict[Key, _Recorded] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result for these inputs, which are copied to where the graph reads them."""
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._known:
            self._known[key] = self._record(inputs)
        recorded = self._known[key]
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.copy_(given)
        recorded.graph.replay()
        return recorded.output

    @property
    def num_graphs(self) -> int:
        """How many were captured."""
        return len(self._known)

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        own = [x.clone() for x in inputs]
        self._function(*own)  # once as usual, so that all kernels are compiled
        with self._device.capture() as graph:
            output = self._function(*own)
        return _Recorded(own, graph, output)
