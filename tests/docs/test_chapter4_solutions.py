"""The solutions of chapter 4, on the emulated GPU, with threads in several orders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import emulation
from kuiperllm.core import Device, Tensor
from kuiperllm.ops.rms_norm import reference

Load = Callable[[str], ModuleType]
SEEDS = range(4)


@pytest.fixture(params=SEEDS)
def device(request: pytest.FixtureRequest, emulated_cuda: Device) -> Any:
    driver = emulation.driver()
    driver.seed = request.param
    yield emulated_cuda
    driver.seed = 0


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def to(device: Device, x: np.ndarray[Any, Any]) -> Tensor:
    return Tensor.from_numpy(x, copy=True).to(device)


@pytest.mark.parametrize("width", [1, 31, 128, 1000])
def test_exercise1_row_scales(solution: Load, device: Device, width: int) -> None:
    x = normal(3, width)
    found = solution("chapter4_exercise1").row_scales(to(device, x)).numpy()
    np.testing.assert_allclose(found, np.abs(x).max(-1) / 127, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 31, 128, 1000])
def test_exercise2_layer_norm(solution: Load, device: Device, width: int) -> None:
    x, weight, bias = normal(3, width) + 100, normal(width, seed=1), normal(width, seed=2)
    found = solution("chapter4_exercise2").layer_norm(*(to(device, a) for a in (x, weight, bias)), 1e-5)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_exercise2_without_its_barrier(solution: Load, emulated_cuda: Device, tmp_path: Path) -> None:
    """Some order of threads must show the error."""
    module = solution("chapter4_exercise2")
    text = module.SOURCE.read_text()
    copy = tmp_path / "layer_norm.cu"
    copy.write_text("\n".join(line for line in text.splitlines() if "__syncthreads" not in line))
    operands = [to(emulated_cuda, a) for a in (normal(1, 500), normal(500, seed=1), normal(500, seed=2))]
    right = module.layer_norm(*operands, 1e-5).numpy()
    driver, wrong = emulation.driver(), 0
    for driver.seed in range(1, 30):
        wrong += not np.allclose(module.layer_norm(*operands, 1e-5, copy).numpy(), right, atol=1e-4)
    driver.seed = 0
    assert wrong > 0


@pytest.mark.parametrize("rows", [1, 4, 7, 33])
def test_exercise3_norm_heads(solution: Load, device: Device, rows: int) -> None:
    x, weight = normal(rows, 64), normal(64, seed=1)
    found = solution("chapter4_exercise3").norm_heads(to(device, x), to(device, weight), 1e-6)
    np.testing.assert_allclose(found.numpy(), reference(x, weight, 1e-6), rtol=1e-5, atol=1e-6)
