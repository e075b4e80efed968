"""Random quantized matrices: of the size that is promised, and made of every code."""

from __future__ import annotations

import numpy as np
import pytest

from kuiperllm.core.dtype import DType
from kuiperllm.errors import ShapeError
from kuiperllm.quant import Scheme, q4, q8
from kuiperllm.quant.codes import dense_layout
from kuiperllm.quant.synthetic import random_tensor

SCHEMES = [
    q8(64),
    q8(32, DType.float32),
    q4(32),
    q4(128, symmetric=False),
    Scheme(5, 32),
    Scheme(4, 32, coding="minimum"),
    Scheme(5, 32, coding="minimum"),
    Scheme(2, 16, DType.int8, "minimum"),
    Scheme(3, 16, DType.int8),
    Scheme(4, 32, DType.int8, "minimum"),
    Scheme(5, 32, DType.int8, "minimum"),
    Scheme(6, 16, DType.int8),
    Scheme(8, 128, DType.float32, "e4m3"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("cheap", [False, True])
def test_weights_have_normal_size(scheme, cheap):
    w = random_tensor(np.random.default_rng(1), scheme, 300, 4096, cheap=cheap)
    assert w.shape == (300, 4096)
    values = w.dequantize().astype(np.float64)
    assert np.isfinite(values).all()
    assert 0.8 / 64 < values.std() < 1.25 / 64
    assert abs(values.mean()) < 0.15 / 64
    if scheme.coding != "e4m3":
        assert set(np.unique(w.codes.unpack())) == set(range(1 << scheme.bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_layouts_have_no_gaps(bits):
    layout = dense_layout(bits)
    assert layout.bits == bits
    assert layout.row_bytes(64) == 8 * bits


def test_numbers_depend_on_the_generator_alone():
    def make(seed):
        return random_tensor(np.random.default_rng(seed), q4(32), 4, 64, shuffled=True)

    assert make(3).dequantize().tobytes() == make(3).dequantize().tobytes()
    assert make(3).dequantize().tobytes() != make(4).dequantize().tobytes()
    assert sorted(make(3).columns) == list(range(64))


def test_a_cheap_matrix_takes_little_memory():
    w = random_tensor(np.random.default_rng(0), q4(32), 1 << 18, 8192, cheap=True)
    assert w.nbytes > 1 << 30
    assert w[-1:].dequantize().any()


def test_groups_that_do_not_divide():
    with pytest.raises(ShapeError, match="groups of 64 do not divide rows of 96"):
        random_tensor(np.random.default_rng(0), q8(64), 2, 96)
