"""The threads that run kernels: every work item once, whatever the number of threads and their history."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import capture, launch, num_threads, set_num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.errors import DeviceError

COUNT = Kernel("simd_kernels", "count_items", FACTOR=1)
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


def counts_of(items: int, grain: int, in_long_runs: bool) -> np.ndarray:
    counts = Tensor.zeros((items + 8,), DType.int64)
    launch(COUNT, counts, items=items, grain=grain, in_long_runs=in_long_runs)
    return counts.numpy()


def assert_each_once(items: int, grain: int, in_long_runs: bool = False) -> None:
    counts = counts_of(items, grain, in_long_runs)
    assert (counts[:items] == 1).all()
    assert (counts[items:] == 0).all()


@pytest.mark.parametrize("threads", range(1, 9))
def test_every_item_runs_once(threads: int) -> None:
    set_num_threads(threads)
    for items, grain in ((0, 1), (1, 1), (2, 1), (threads, 1), (97, 1), (97, 10), (97, 1000), (5000, 7)):
        assert_each_once(items, grain)
        assert_each_once(items, grain, in_long_runs=True)


def test_fewer_items_than_threads() -> None:
    set_num_threads(8)
    for _ in range(200):
        assert_each_once(3, 1)


def test_many_tiny_launches() -> None:
    set_num_threads(2)
    counts = Tensor.zeros((2,), DType.int64)
    for _ in range(5000):
        launch(COUNT, counts, items=2)
    assert counts.tolist() == [5000, 5000]


def test_number_of_threads_may_shrink_and_grow() -> None:
    for threads in (4, 1, 2, 8, 3, 1, 5):
        set_num_threads(threads)
        assert num_threads() == threads
        for _ in range(20):
            assert_each_once(50, 1)


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_impossible_numbers_of_threads(threads: int) -> None:
    with pytest.raises(DeviceError, match=rf"^threads must be 1 to 1024, not {threads}$"):
        set_num_threads(threads)


def test_launches_from_several_python_threads() -> None:
    set_num_threads(2)
    tensors = [Tensor.zeros((64,), DType.int64) for _ in range(4)]

    def work(counts: Tensor) -> None:
        for _ in range(300):
            launch(COUNT, counts, items=64)

    workers = [threading.Thread(target=work, args=(counts,)) for counts in tensors]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    for counts in tensors:
        assert (counts.numpy() == 300).all()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_graph_runs_its_launches_in_order_each_time(threads: int) -> None:
    set_num_threads(threads)
    counts = Tensor.zeros((40,), DType.int64)
    with capture() as graph:
        for items in (40, 1, 17, 3):
            launch(COUNT, counts, items=items)
        launch(COUNT, counts, items=0)
    assert len(graph) == 4
    assert (counts.numpy() == 0).all()
    for _ in range(100):
        graph.replay()
    expected = sum((np.arange(40) < items).astype(int) for items in (40, 1, 17, 3))
    np.testing.assert_array_equal(counts.numpy(), expected * 100)


def test_graph_survives_a_change_of_threads_and_its_tensors() -> None:
    set_num_threads(1)
    counts = Tensor.zeros((30,), DType.int64)
    view = counts.numpy()
    with capture() as graph:
        launch(COUNT, counts, items=30)
    del counts
    for threads in (1, 3, 2):
        set_num_threads(threads)
        graph.replay()
    assert (view == 3).all()


def test_empty_graph() -> None:
    with capture() as graph:
        pass
    graph.replay()
    assert len(graph) == 0


def test_captures_do_not_nest_and_end_on_errors() -> None:
    with (
        pytest.raises(DeviceError, match=r"^a graph is already being captured; finish it first$"),
        capture(),
        capture(),
    ):
        pass
    assert_each_once(3, 1)


FORK = """
import os, sys
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, set_num_threads
from kuiperllm.core import DType, Tensor
kernel = Kernel("simd_kernels", "count_items", FACTOR=1)

def run():
    counts = Tensor.zeros((200,), DType.int64)
    for _ in range(50):
        launch(kernel, counts, items=200)
    return (counts.numpy() == 50).all()

set_num_threads(2)
assert run()
child = os.fork()
set_num_threads(3)
good = run()
if child == 0:
    os._exit(0 if good else 1)
_, status = os.waitpid(child, 0)
assert good and run() and status == 0, status
print("good")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_in_the_middle() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])}
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "good\n", done.stderr
