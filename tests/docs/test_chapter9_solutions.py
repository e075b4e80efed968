"""The solutions of chapter 9."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kuiperllm.core import Device, Tensor
from site_pages import ROOT

Load = Callable[[str], ModuleType]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that draws fragments; its places are checked against the instruction by a snippet."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "site" / "figures"))
    import tensor_cores

    yield tensor_cores
    for name in ("tensor_cores", "canvas"):
        sys.modules.pop(name, None)


def test_exercise1_holders(solution: Load, figures: Any) -> None:
    module = solution("chapter9_exercise1")
    for lane in range(32):
        for i in range(8):
            assert module.holder_in_a(*figures.place_in_a(lane, i)) == (lane, i // 2, i % 2)
        for i in range(4):
            assert module.holder_in_b(*figures.place_in_b(lane, i)) == (lane, i // 2, i % 2)
            assert module.holder_in_c(*figures.place_in_c(lane, i)) == (lane, i)


def test_exercise2_second_operand_by_rows(solution: Load, emulated_cuda: Device) -> None:
    rng = np.random.default_rng(9)
    a = rng.integers(-8, 9, (16, 16)).astype(ml_dtypes.bfloat16)
    w = rng.integers(-8, 9, (16, 8)).astype(ml_dtypes.bfloat16)
    on_device = [Tensor.from_numpy(x).to(emulated_cuda) for x in (a, w)]
    found = solution("chapter9_exercise2").product_kn(*on_device).numpy()
    np.testing.assert_array_equal(found, a.astype(np.float32) @ w.astype(np.float32))


def test_exercise3_waves(solution: Load) -> None:
    module = solution("chapter9_exercise3")
    assert module.used(128 * 132, 128, (128, 128)) == 1
    assert module.used(128, 128, (128, 128)) == pytest.approx(1 / 132)
    assert module.used(1, 1, (128, 128)) == pytest.approx(1 / (132 * 128 * 128))
    assert module.best_tile(512, 28672) == (128, 224)
    assert module.used(512, 28672, (128, 224)) == pytest.approx(512 / 528)
    assert module.used(512, 28672, (128, 256)) == pytest.approx(448 / 528)
