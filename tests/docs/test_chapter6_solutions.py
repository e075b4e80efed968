"""The solutions of chapter 6: products by groups, codes by a table, a type of GGUF that nobody reads yet."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import gguf
import numpy as np
import pytest

from kuiperllm.core import DType, Tensor
from kuiperllm.errors import UnsupportedError
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.quant import Scheme, q4, q8, quantize
from kuiperllm.quant.ggml import formats
from kuiperllm.quant.synthetic import random_tensor

Solution = Callable[[str], ModuleType]

SCHEMES = [
    q8(64),
    q4(32),
    q4(32, symmetric=False),
    Scheme(5, 32, coding="minimum"),
    Scheme(4, 32, DType.int8, "minimum"),
    Scheme(6, 16, DType.int8),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_exercise1(solution: Solution, scheme: Scheme) -> None:
    product_by_groups = solution("chapter6_exercise1").product_by_groups
    rng = np.random.default_rng(0)
    tensor, x = random_tensor(rng, scheme, 48, 512), rng.standard_normal(512, np.float32)
    np.testing.assert_allclose(product_by_groups(tensor, x), tensor.dequantize() @ x, atol=2e-5)


def test_exercise2(solution: Solution) -> None:
    module = solution("chapter6_exercise2")
    table = module.normal_table()
    assert len(table) == 16
    assert (np.diff(table) > 0).all()
    assert table[0] == -1
    assert table[-1] == 1
    w = np.random.default_rng(0).standard_normal((64, 1024), np.float32)

    def by_table(group_size: int) -> np.ndarray:
        codes, scales = module.quantize_by_table(w, table, group_size)
        assert codes.dtype == np.uint8
        assert codes.max() < 16
        assert scales.shape == (64, 1024 // group_size)
        back: np.ndarray = module.dequantize_by_table(codes, scales, table)
        values = scales.astype(np.float32)[:, :, None, None] * table
        best = np.abs(values - w.reshape(64, -1, group_size, 1)).min(axis=3)
        np.testing.assert_allclose(np.abs(back - w), best.reshape(w.shape), atol=1e-6)
        return back

    def gain(group_size: int) -> float:
        """Error of equal steps by that of the table."""
        of_steps = np.linalg.norm(quantize(w, q4(group_size)).dequantize() - w)
        return float(of_steps / np.linalg.norm(by_table(group_size) - w))

    gains = [gain(size) for size in (32, 64, 128, 1024)]
    assert gains == sorted(gains)
    assert gains[0] < 1 < gains[1]


def test_exercise2_takes_groups_of_zeros(solution: Solution) -> None:
    module = solution("chapter6_exercise2")
    table, w = module.normal_table(), np.zeros((2, 64), np.float32)
    assert not module.dequantize_by_table(*module.quantize_by_table(w, table, 32), table).any()


def test_exercise3(solution: Solution) -> None:
    (tq2_0,) = solution("chapter6_exercise3").FORMATS
    assert tq2_0.number not in formats()
    rng = np.random.default_rng(0)
    blocks = np.empty((12, 66), np.uint8)
    codes = rng.integers(0, 3, (12, 64, 4), np.uint8)
    blocks[:, :64] = (codes << np.array([0, 2, 4, 6], np.uint8)).sum(axis=2)
    blocks[:, 64:].view(np.float16)[:] = rng.uniform(-1, 1, (12, 1))
    raw = blocks.reshape(6, 132)

    tensor = tq2_0.unpack(raw.reshape(-1), (6, 512))
    matrix = tensor.dequantize()
    np.testing.assert_array_equal(matrix, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.TQ2_0))
    np.testing.assert_array_equal(tq2_0.pack(tensor), raw)

    x = rng.standard_normal((3, 512), np.float32)
    y = linear(Tensor.from_numpy(x), LinearWeight.pack(tensor)).numpy()
    np.testing.assert_allclose(y, x @ matrix.T, atol=0.02 * np.abs(y).max())  # x is rounded to int8


def test_exercise3_refuses_other_zero_points(solution: Solution) -> None:
    module = solution("chapter6_exercise3")
    tensor = random_tensor(np.random.default_rng(0), module.SCHEME, 2, 256)
    assert tensor.zeros is not None
    tensor.zeros[:] = 2
    with pytest.raises(UnsupportedError, match="zero points"):
        module.FORMATS[0].pack(tensor)
