"""The solutions of chapter 1: waste of a pool, best fit, memory in files."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kuiperllm.core import Allocator, Device, Tensor
from kuiperllm.errors import OutOfMemoryError

Load = Callable[[str], ModuleType]


def test_exercise1_waste(solution: Load) -> None:
    module = solution("chapter1_exercise1")
    assert module.waste([1024, 1024]) == 0
    assert module.waste([1025]) == pytest.approx(1 - 1025 / 1152)
    assert module.waste([1025, 1024]) == pytest.approx(1 - 2049 / (1152 + 1024))
    assert module.waste([3 << 20], granularity=2 << 20) == pytest.approx(1 / 4)


def test_exercise1_worst_size(solution: Load) -> None:
    module = solution("chapter1_exercise1")
    size, over = module.worst_size()
    assert 0.12 < over <= 0.125
    assert over == pytest.approx(1 / (1 - module.waste([size])) - 1)
    for other in range(512, 5000, 3):
        assert 1 / (1 - module.waste([other])) - 1 <= over + 1e-12


def test_exercise2_policies_differ_only_where_there_is_a_choice(solution: Load) -> None:
    module = solution("chapter1_exercise2")
    for policy, left in (("best", [80]), ("first", [72])):
        pool = module.LargeBlocks(policy, free=[80, 72])
        assert pool.take(72) == 152 - left[0]
        assert pool.free == left
        assert pool.reserved == 0
    pool = module.LargeBlocks("best", free=[82])
    assert pool.take(72) == 72  # 82 would waste more than an eighth
    assert pool.reserved == 72


def test_exercise2_best_fit_reserves_less(solution: Load) -> None:
    module = solution("chapter1_exercise2")
    taken = {number for what, number in module.trace(3) if what == "give"}
    assert len(taken) == sum(what == "give" for what, _ in module.trace(3))
    ratio = module.compare()
    assert 0.9 < ratio < 1


def test_exercise3_tensors_in_files(solution: Load, tmp_path: Path) -> None:
    source = solution("chapter1_exercise3").FileMemory(tmp_path)
    pool = Allocator(source, Device("cpu"))
    values = np.arange(1 << 19, dtype=np.float32)
    tensor = Tensor(pool.allocate(2 << 20), "float32", (1 << 19,))
    tensor.copy_(Tensor.from_numpy(values))
    (file,) = tmp_path.iterdir()
    np.testing.assert_array_equal(np.fromfile(file, np.float32), values)
    assert tensor.address % source.alignment == 0

    del tensor
    gc.collect()
    pool.empty_cache()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutOfMemoryError, match="file memory: needs"):
        pool.allocate(1 << 60)
