"""Every case of every operator: its values, on one thread and several, eager and replayed from a graph."""

from __future__ import annotations

import pytest

from kuiperllm.backends.cpu.team import num_threads, set_num_threads
from kuiperllm.core import Device, Tensor
from kuiperllm.ops.cases import Case, all_cases

CASES = [pytest.param(case, id=case.id) for case in all_cases()]


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest):
    before = num_threads()
    set_num_threads(request.param)
    yield request.param
    set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_values(case: Case, threads: int) -> None:
    arguments = case.arguments()
    case.compare(case.run(case.tensors(arguments)), case.expected(arguments))


@pytest.mark.parametrize("case", CASES)
def test_replayed_from_a_graph(case: Case) -> None:
    arguments = case.arguments()
    tensors = case.tensors(arguments)
    with Device("cpu").capture() as graph:
        found = case.run(tensors)
    given = [t for t in tensors.values() if isinstance(t, Tensor)]
    for result in found:
        if not any(result is t for t in given):
            result.buffer.fill(0xFF)
    graph.replay()
    case.compare(found, case.expected(arguments))


def test_case_names_are_distinct() -> None:
    names = [case.id for case in all_cases()]
    assert len(names) == len(set(names))
