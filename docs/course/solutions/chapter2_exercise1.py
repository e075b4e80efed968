"""Runs the cases of operators that lie outside the package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kuiperllm.ops
from kuiperllm.core import Device, Tensor
from kuiperllm.ops.cases import Case

OPS = Path(__file__).resolve().parents[1] / "ops"


@contextmanager
def operators_in(folder: Path = OPS) -> Iterator[None]:
    """Let the package `kuiperllm.ops` continue in a folder, inside the `with` block."""
    kuiperllm.ops.__path__.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        kuiperllm.ops.__path__.remove(str(folder))


def check(case: Case, device: Device) -> None:
    """Raise AssertionError unless a case agrees with its reference, called and replayed from a graph."""
    arguments = case.arguments()
    expected = case.expected(arguments)
    case.compare(case.run(case.tensors(arguments, device)), expected)

    tensors = case.tensors(arguments, device)
    with device.capture() as graph:
        found = case.run(tensors)
    for result in found:
        if not any(result is given for given in tensors.values() if isinstance(given, Tensor)):
            result.buffer.fill(0xFF)  # NaN everywhere: what is right afterwards was computed by the replay
    graph.replay()
    case.compare(found, expected)


def check_operator(name: str) -> int:
    """Check every case of an operator on the CPU; how many there were."""
    with operators_in():
        cases: list[Case] = importlib.import_module(f"kuiperllm.ops.{name}").CASES
        for case in cases:
            check(case, Device("cpu"))
    return len(cases)
