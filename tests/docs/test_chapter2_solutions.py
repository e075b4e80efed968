"""The solutions of chapter 2: an operator, a trace, a device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest

from kuiperllm.core import Device, Tensor
from kuiperllm.errors import DeviceError, KernelError
from kuiperllm.ops.cases import all_cases

Load = Callable[[str], ModuleType]


@pytest.mark.parametrize("name", ["gelu_mul", "relu_squared"])
def test_exercise1_cases(name: str, solution: Load) -> None:
    assert solution("chapter2_exercise1").check_operator(name) == 5
    assert name not in {case.op for case in all_cases()}  # the package is as it was


def test_exercise1_extreme_gates(solution: Load) -> None:
    with solution("chapter2_exercise1").operators_in():
        gelu_mul = importlib.import_module("kuiperllm.ops.gelu_mul").gelu_mul
        gates = [-1e30, -60.0, -1.0, 0.0, 1.0, 60.0, 1e10]
        rows = Tensor.from_numpy(np.array([[*gates, *([1.0] * 7)]], np.float32))
        expected = [0.0, 0.0, -0.15880801, 0.0, 0.84119199, 60.0, 1e10]
        np.testing.assert_allclose(gelu_mul(rows).numpy()[0], expected, rtol=1e-6, atol=1e-7)


def test_exercise1_a_wrong_kernel_is_found(solution: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module = solution("chapter2_exercise1")
    with module.operators_in():
        launcher = importlib.import_module("kuiperllm.ops.gelu_mul.cpu")
        silu_mul = importlib.import_module("kuiperllm.ops.silu_mul.cpu")._SILU_MUL
        monkeypatch.setattr(launcher, "_GELU_MUL", silu_mul)
        with pytest.raises(AssertionError):
            module.check_operator("gelu_mul")


def test_exercise2_launches_are_listed(solution: Load) -> None:
    module = solution("chapter2_exercise2")
    silu_mul = importlib.import_module("kuiperllm.ops.silu_mul").silu_mul
    x = Tensor.zeros((3, 16))
    with module.trace() as launches:
        silu_mul(x)
        with Device("cpu").capture() as graph:
            silu_mul(x)
        graph.replay()
    bytes_of_both = 3 * 16 * 4 + 3 * 8 * 4
    assert launches == [
        module.Launch("silu_mul", 3, bytes_of_both, False),
        module.Launch("silu_mul", 3, bytes_of_both, True),
    ]
    silu_mul(x)
    assert len(launches) == 2


def test_exercise2_a_decode_step_repeats_its_layers(solution: Load) -> None:
    module = solution("chapter2_exercise2")
    launches = module.decode_step()
    names = [launch.kernel for launch in launches]
    starts = [index for index, name in enumerate(names) if name == "write_kv"]
    lengths = {after - before for before, after in pairwise(starts)}
    assert len(starts) == 5, names
    assert len(lengths) == 1, names
    totals = list(module.by_bytes(launches).values())
    assert totals == sorted(totals, reverse=True)


def test_exercise3_cases_on_the_toy_device(solution: Load) -> None:
    module = solution("chapter2_exercise3")
    copied = module.check_relu_squared()
    assert copied["host to device"] > 0
    assert copied["device to host"] > 0
    with pytest.raises(DeviceError, match="unknown device 'toy:1'"):
        Device("toy:1")  # outside the block there is no such back end


def test_exercise3_what_the_device_cannot_do(solution: Load) -> None:
    module = solution("chapter2_exercise3")
    with module.toy_device() as device:
        x = Tensor.from_numpy(np.ones((2, 4), np.float32)).to(device)
        with pytest.raises(KernelError, match="silu_mul on toy:0: no kernel; candidates: cpu"):
            importlib.import_module("kuiperllm.ops.silu_mul").silu_mul(x)
        with pytest.raises(DeviceError, match="operands must live on one device"):
            importlib.import_module("kuiperllm.ops.relu_squared").relu_squared(x, out=Tensor.zeros((2, 4)))
        with pytest.raises(DeviceError, match="records no graphs"):
            device.capture()
