"""Int8 groups: the rounding, its bound, and what is refused."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kuiperllm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from kuiperllm.quant import QuantTensor, int8_tensor, quantize_q8


def values_of(q: QuantTensor) -> np.ndarray:
    return q.codes.data.view(np.int8)


def test_worked_example():
    w = np.array([[1.27, -0.635, 0.01, 0.0, 254.0, 127.0, -254.0, 1.0]], np.float32)
    q = quantize_q8(w, 4)
    # Against the stored float16 scale 0.01000213…: 1.27 / 0.0100021 = 126.97, 0.635 / 0.0100021 = 63.49
    assert q.scales.tolist() == [[float(np.float16(0.01)), 2.0]]
    assert values_of(q).tolist() == [[127, -63, 1, 0, 127, 64, -127, 0]]  # 63.5 goes to the even 64, 0.5 to 0
    assert (q.shape, q.group_size, q.nbytes) == ((1, 8), 4, 8 + 2 * 2)


def test_dequantize_multiplies_each_group_by_its_scale():
    q = int8_tensor(
        np.array([[1, -2, 3, 4], [5, 6, -7, 127]], np.int8), np.array([[0.5, 2], [1, 4]], np.float32)
    )
    assert q.dequantize().tolist() == [[0.5, -1, 6, 8], [5, 6, -28, 508]]
    assert q.dequantize().dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 32, 32), (7, 96, 32), (3000, 128, 64), (5, 256, 128)]
)
def test_every_weight_comes_back_within_half_a_scale(dtype, rows, columns, group):
    w = np.random.default_rng(rows).normal(0, 0.05, (rows, columns)).astype(dtype)
    q = quantize_q8(w, group)
    error = np.abs(q.dequantize().astype(np.float64) - w.astype(np.float64)).reshape(rows, -1, group)
    assert (error <= q.scales.astype(np.float64)[:, :, None] * 0.500001).all()
    assert q.scales.dtype == np.float16
    assert q.scales.astype(np.float64).max() < np.abs(w.astype(np.float64)).max() / 126.9


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        (3, 8),
        elements=st.one_of(
            st.floats(-8.3e6, 8.3e6, width=32),
            st.floats(-(2.0**-20), 2.0**-20, width=32),
            st.floats(-1, 1, width=32),
        ),
    )
)
def test_bound_holds_at_every_magnitude(w):
    """From scales below float16's smallest number up to its largest one."""
    q = quantize_q8(w, 4)
    assert np.abs(values_of(q).astype(int)).max() <= 127
    error = np.abs(q.dequantize().astype(np.float64) - w).reshape(3, 2, 4)
    assert (error <= q.scales.astype(np.float64)[:, :, None] * 0.50001).all()
    assert ((q.scales == 0) == (w.reshape(3, 2, 4) == 0).all(axis=2)).all()


def test_zero_groups_stay_zero():
    q = quantize_q8(np.zeros((2, 64), np.float32), 32)
    assert not values_of(q).any()
    assert not q.scales.any()
    assert not q.dequantize().any()


def test_a_large_matrix_needs_little_memory_beside_its_result():
    w = np.ones((4096, 2048), np.float16)
    tracemalloc.start()
    q = quantize_q8(w, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < q.nbytes + (4 << 20)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    w = np.ones((2, 32), np.float32)
    w[1, 3] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        quantize_q8(w, 32)


def test_too_large_for_a_float16_scale():
    with pytest.raises(UnsupportedError, match=r"1e\+07 is too large .* 8\.32e\+06"):
        quantize_q8(np.full((1, 32), 1e7, np.float32), 32)
    largest = np.full((1, 32), 65504.0 * 127, np.float32)
    assert (quantize_q8(largest, 32).dequantize() == largest).all()


@pytest.mark.parametrize(
    ("shape", "group", "message"),
    [
        ((2, 100), 32, "groups of 32 do not divide rows of 100"),
        ((2, 32), 0, "groups of 0"),
        ((32,), 32, "only a matrix"),
        ((0, 32), 32, "not empty"),
    ],
)
def test_shapes_that_do_not_fit(shape, group, message):
    with pytest.raises(ShapeError, match=message):
        quantize_q8(np.ones(shape, np.float32), group)


def test_integers_are_refused():
    with pytest.raises(DTypeError, match="int32"):
        quantize_q8(np.ones((2, 32), np.int32), 32)


@pytest.mark.parametrize(
    ("values", "scales", "error"),
    [
        (np.ones((2, 8), np.int8), np.ones((1, 2), np.float16), ShapeError),
        (np.ones((2, 8), np.int8), np.ones((2, 3), np.float16), ShapeError),
        (np.ones((2, 8), np.int8), np.ones(2, np.float16), ShapeError),
        (np.ones((2, 8), np.int8), np.ones((2, 0), np.float16), ShapeError),
        (np.ones((2, 8), np.uint8), np.ones((2, 2), np.float16), DTypeError),
        (np.ones((2, 8), np.int8), np.ones((2, 2), np.float64), DTypeError),
    ],
)
def test_parts_that_do_not_fit_together(values, scales, error):
    with pytest.raises(error):
        int8_tensor(values, scales)
