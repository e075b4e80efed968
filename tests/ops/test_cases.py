"""Every case of every operator on every device: its values, eager and replayed from a graph."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from kuiperllm.backends.cpu.team import num_threads, set_num_threads
from kuiperllm.backends.cuda.jit import cache_dir
from kuiperllm.backends.cuda.launch import Kernel, chip, collecting, compile_all
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import KuiperError
from kuiperllm.ops.cases import Case, all_cases

EMULATED_BYTES = 4 << 20
"""Cases whose arguments take more are too slow on an emulated GPU."""

CASES = [pytest.param(case, id=case.id) for case in all_cases()]


def _cuda_cases() -> Iterator[Any]:
    """The cases of the operators that have CUDA kernels, once for each type of activations."""
    for case in all_cases():
        if importlib.util.find_spec(_cuda_module(case)) is not None:
            for dtype in case.dtypes:
                yield pytest.param(case, dtype, id=f"{case.id}-{dtype}")


def _cuda_module(case: Case) -> str:
    return f"{case.function.__module__}.cuda"


CUDA_CASES = list(_cuda_cases())


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
    case.compare(_replay(case, case.tensors(arguments), Device("cpu")), case.expected(arguments))


@pytest.fixture
def compiled_ahead(cuda: Device, request: pytest.FixtureRequest) -> None:
    """With an empty cache, compile what the tests of the session need, on all processors at once."""
    if _compiled_ahead or (cache_dir().is_dir() and any(cache_dir().iterdir())):
        return
    _compiled_ahead.append(True)
    needed: dict[Kernel, None] = {}
    for item in request.session.items:
        if getattr(item, "originalname", None) == "test_values_on_cuda":
            case, dtype = item.callspec.params["case"], item.callspec.params["dtype"]
            with suppress(KuiperError, pytest.skip.Exception), collecting(cuda) as kernels:
                _skip_unless_possible(case, dtype, cuda)
                case.run(case.tensors(case.arguments(dtype=dtype), cuda))
            needed |= kernels
    with suppress(KuiperError):  # the test that needs the kernel will say so
        compile_all(needed, cuda)


_compiled_ahead: list[bool] = []


@pytest.mark.usefixtures("compiled_ahead")
@pytest.mark.parametrize(("case", "dtype"), CUDA_CASES)
def test_values_on_cuda(case: Case, dtype: DType, cuda: Device) -> None:
    _skip_unless_possible(case, dtype, cuda)
    arguments = case.arguments(dtype=dtype)
    case.compare(case.run(case.tensors(arguments, cuda)), case.expected(arguments, cuda), dtype)


@pytest.mark.parametrize(("case", "dtype"), CUDA_CASES)
def test_replayed_from_a_graph_on_cuda(case: Case, dtype: DType, cuda: Device) -> None:
    _skip_unless_possible(case, dtype, cuda)
    arguments = case.arguments(dtype=dtype)
    if not _is_emulated(cuda):
        case.run(case.tensors(arguments, cuda))  # compiles and loads the kernels
    with _random_schedule(cuda):
        found = _replay(case, case.tensors(arguments, cuda), cuda)
    case.compare(found, case.expected(arguments, cuda), dtype)


def _replay(case: Case, tensors: dict[str, Any], device: Device) -> tuple[Tensor, ...]:
    """What a graph of the case leaves, after what it left when it was captured was wiped."""
    with device.capture() as graph:
        found = case.run(tensors)
    given = [t for t in tensors.values() if isinstance(t, Tensor)]
    for result in found:
        if not any(result is t for t in given):
            result.buffer.fill(0xFF)
    graph.replay()
    return found


def _is_emulated(device: Device) -> bool:
    return chip(device).name == "emulated"


@contextmanager
def _random_schedule(device: Device) -> Iterator[None]:
    """Let threads run in a random order on an emulated GPU; a real one has its own."""
    if not _is_emulated(device):
        yield
        return
    import emulation

    driver = emulation.driver()
    driver.seed = 1
    try:
        yield
    finally:
        driver.seed = 0


def _skip_unless_possible(case: Case, dtype: DType, device: Device) -> None:
    if dtype not in getattr(importlib.import_module(_cuda_module(case)), "DTYPES", (DType.float32,)):
        pytest.skip(f"no kernels for {dtype}")
    if _is_emulated(device) and _argument_bytes(case.id) > EMULATED_BYTES:
        pytest.skip("too large for an emulated GPU")


@lru_cache(maxsize=1024)
def _argument_bytes(name: str) -> int:
    case = next(case for case in all_cases() if case.id == name)
    return sum(value.nbytes for value in case.arguments().values() if isinstance(value, np.ndarray))


def test_case_names_are_distinct() -> None:
    names = [case.id for case in all_cases()]
    assert len(names) == len(set(names))
