"""A list of the kernels that are launched on the CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import CpuGraph, Team
from kuiperllm.core import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel over some work items."""

    kernel: str
    items: int
    nbytes: int
    """Bytes of the tensors that it was given."""
    recorded: bool
    """Whether a graph recorded it, instead of running it."""


@contextmanager
def trace() -> Iterator[list[Launch]]:
    """Note every launch inside the `with` block, in order."""
    launches: list[Launch] = []

    def noting(method: Any, recorded: bool) -> Any:
        def wrapper(self: Any, kernel: Kernel, arguments: tuple[Any, ...], items: int, *shares: int) -> None:
            nbytes = sum(value.nbytes for value in arguments if isinstance(value, Tensor))
            launches.append(Launch(kernel.name, items, nbytes, recorded))
            method(self, kernel, arguments, items, *shares)

        return wrapper

    launch, record = Team.launch, CpuGraph.record
    Team.launch = noting(launch, recorded=False)  # type: ignore[method-assign]
    CpuGraph.record = noting(record, recorded=True)  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        Team.launch, CpuGraph.record = launch, record  # type: ignore[method-assign]


def decode_step() -> list[Launch]:
    """The launches of one greedy decode step of the demo model: what is recorded after the prompt's pass."""
    from kuiperllm import LLM, SamplingParams

    llm = LLM(device="cpu")
    with trace() as launches:
        llm.generate("ROMEO:", SamplingParams(temperature=0.0, max_tokens=4))
    recorded = [launch for launch in launches if launch.recorded]
    begin = max(index for index, launch in enumerate(recorded) if launch.kernel.startswith("embedding"))
    return recorded[begin:]


def by_bytes(launches: list[Launch]) -> dict[str, int]:
    """Bytes by kernel, the most first."""
    totals: dict[str, int] = defaultdict(int)
    for launch in launches:
        totals[launch.kernel] += launch.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
