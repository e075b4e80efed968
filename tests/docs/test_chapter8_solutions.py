"""The solutions of chapter 8: a captured function, sizes of captured steps, the time of a chain."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from types import ModuleType

import numpy as np
import pytest

from kuiperllm.core import Device, Tensor
from kuiperllm.ops.add import add
from kuiperllm.ops.rms_norm import rms_norm

Solution = Callable[[str], ModuleType]


def test_exercise1(solution: Solution) -> None:
    rng = np.random.default_rng(0)
    weight = Tensor.from_numpy(rng.standard_normal(64, np.float32))
    calls = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        calls.append(x.shape)
        return rms_norm(add(x, y), weight, 1e-5)

    captured = solution("chapter8_exercise1").Captured(function, Device("cpu"))
    for rows in (1, 3, 1, 3, 3):
        x, y = (Tensor.from_numpy(rng.standard_normal((rows, 64), np.float32)) for _ in range(2))
        expected = rms_norm(add(x, y), weight, 1e-5).numpy()
        np.testing.assert_array_equal(captured(x, y).numpy(), expected)
    assert captured.num_graphs == 2
    assert calls == [(1, 64), (1, 64), (3, 64), (3, 64)]  # to compile and to capture, then never again


def test_exercise2(solution: Solution) -> None:
    module = solution("chapter8_exercise2")
    assert module.padding([4, 8], {3: 10, 8: 1, 5: 2}) == 10 + 6
    assert module.padding([4], {5: 1}) == float("inf")
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = {int(size): int(steps) for size, steps in zip(
            rng.choice(np.arange(1, 30), 8, replace=False), rng.integers(1, 50, 8), strict=True)}  # fmt: skip
        for most in (1, 2, 3, 8):
            found = module.best_sizes(counts, most)
            assert len(found) <= most
            least = min(module.padding(sizes, counts) for sizes in combinations(sorted(counts), most))
            assert module.padding(found, counts) == least


@pytest.mark.parametrize("count", [1, 2, 5])
def test_exercise3(solution: Solution, count: int) -> None:
    module = solution("chapter8_exercise3")
    links = [module.Link(fetch=2.0, work=5.0)] * count
    assert module.chain_time(links, early=False, gap=1.0) == count * 7 + (count - 1)
    assert module.chain_time(links, early=True) == 2 + count * 5  # only the first fetch is seen
    slow = [module.Link(fetch=8.0, work=5.0)] * count
    assert module.chain_time(slow, early=True) == 8 + count * 5


def test_exercise3_of_unlike_kernels(solution: Solution) -> None:
    module = solution("chapter8_exercise3")
    link = module.Link
    # Allowed at 3, the second has fetched at 3 + 10, after the first ended at 1 + 6.
    assert module.chain_time([link(1, 6, 3), link(10, 2)], early=True) == 15
    # The third may start with the second, at 3, and has fetched at 4; the second ends at 15.
    assert module.chain_time([link(1, 6, 3), link(10, 2, 0), link(1, 4)], early=True) == 19
    # Who lets nobody start before its end gives no head start, but there is no gap either.
    assert module.chain_time([link(1, 6, 100), link(10, 2)], early=True) == 7 + 12
