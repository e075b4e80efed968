"""Rounding to codes: the rule restated weight by weight, what a search gains, what GGUF's types keep."""

from __future__ import annotations

import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, DTypeError, ShapeError, UnsupportedError
from kuiperllm.quant import QuantTensor, Scheme, q4, q8, quantize, quantize_q8
from kuiperllm.quant.ggml import formats

F = np.float32


def zeros(bits, group):
    return Scheme(bits, group, DType.float16, "zeros")


def minimum(bits, group=32):
    return Scheme(bits, group, DType.float16, "minimum")


PLAIN = [
    q8(32),
    q8(16, DType.float32),
    q4(32),
    q4(128),
    Scheme(4, 64, DType.float32),
    *(Scheme(bits, 32) for bits in (2, 3, 5, 6)),
    *(zeros(bits, 32) for bits in (2, 3, 4, 5, 6, 8)),
    minimum(4),
    minimum(5),
    minimum(8, 64),
]
K_QUANTS = [block_format for block_format in formats().values() if block_format.name.endswith("_K")]


def stored_scale(scheme, scale, reach, limit):
    """A scale as the scheme stores it: in float16 not so small that `limit` of it are less than `reach`."""
    if scheme.scale is DType.float32:
        return scale
    half = np.float16(scale)
    if F(abs(half)) * F(limit) < reach:
        half = np.nextafter(half, np.float16(np.copysign(np.inf, scale)))
    return half


def rounded_by_rule(group, scheme):
    """Scale, zero and codes of a group, each weight for itself, as the docstring of `quantize` has it."""
    high, low, middle, top = max(group), min(group), 1 << (scheme.bits - 1), (1 << scheme.bits) - 1
    if scheme.coding == "middle" and scheme.bits == 8:
        largest = max(high, -low)
        scale = stored_scale(scheme, largest / F(127), largest, 127.5)
        least, most, zero = -127, 127, None
    elif scheme.coding == "middle":
        farthest = high if high >= -low else low
        scale = stored_scale(scheme, farthest / F(-(middle + 0.25)), abs(farthest), middle + 0.5)
        least, most, zero = -middle, middle - 1, None
    elif scheme.coding == "zeros":
        high, low = max(high, F(0)), min(low, F(0))
        scale = stored_scale(scheme, (high - low) / F(top + 0.5), high - low, top + 1)
        ratio = (high + low) / F(scale) if scale else F(0)
        zero = int(min(max(np.rint((F(top) - ratio) * F(0.5)), 0), top))
        least, most = -zero, top - zero
    else:
        scale = stored_scale(scheme, (high - low) / F(top), high - low, top + 0.5)
        zero = scheme.scale.numpy.type(-low)
        least, most = 0, top
    codes = []
    for weight in group:
        shifted = weight + F(zero) if scheme.coding == "minimum" else weight
        code = int(np.rint(shifted / (F(scale) or F(1))))
        offset = {"middle": middle, "zeros": zero, "minimum": 0}[scheme.coding]
        codes.append(min(max(code, least), most) + offset)
    return scale, zero, codes


@pytest.mark.parametrize("scheme", PLAIN, ids=repr)
@pytest.mark.parametrize("size", [1, 3e-6, 1e-7, 1e4])
def test_rule_weight_by_weight(scheme, size):
    rng = np.random.default_rng(0)
    w = (rng.standard_t(4, (6, 128)) * size).astype(F)
    w[1] = abs(w[1])
    w[2] = -abs(w[2])
    w[3] = np.repeat([0, 0, 0, size], 32)
    w[4] = np.tile([size, -size], 64)  # as large up as down
    q = quantize(w, scheme)
    assert q.scheme == scheme
    codes = q.codes.unpack()
    for row in range(len(w)):
        for i, group in enumerate(w[row].reshape(-1, scheme.group_size)):
            scale, zero, expected = rounded_by_rule(list(group), scheme)
            assert q.scales[row, i] == scale, (row, i)
            if zero is not None:
                assert q.zeros[row, i] == zero, (row, i)
            assert codes[row].reshape(-1, scheme.group_size)[i].tolist() == expected, (row, i)


def test_worked_example():
    w = np.array([[8.25, -3.0, 0.5, 1.5, -1.5, 0, 2.5, -8.0]], F)
    q = quantize(w, q4(8))
    assert q.scales.tolist() == [[-1.0]]
    # In scales: -8.25, 3, -0.5, -1.5, 1.5, 0, -2.5, 8. Halves go to even numbers, 8 is cut off to 7.
    assert (q.codes.unpack().astype(int) - 8).tolist() == [[-8, 3, 0, -2, 2, 0, -2, 7]]
    q = quantize(w, zeros(4, 8))
    assert q.scales.astype(float).round(3).tolist() == [[1.049]]  # 16.25 / 15.5, in float16
    assert q.zeros.tolist() == [[7]]  # (15 - 0.25 / 1.049) / 2 = 7.38
    assert q.codes.unpack().tolist() == [[15, 4, 7, 8, 6, 7, 9, 0]]


def test_q8_is_quantize_q8():
    w = np.random.default_rng(1).normal(0, 0.1, (33, 192)).astype(ml_dtypes.bfloat16)
    ours, same = quantize(w, q8(64)), quantize_q8(w, 64)
    assert ours.codes.data.tobytes() == same.codes.data.tobytes()
    assert ours.scales.tobytes() == same.scales.tobytes()


def test_the_least_int8_code_is_never_used():
    """Where float16 is so coarse that 127.5 scales make the largest weight: that rounds to 128."""
    w = np.full((1, 8), 127.5 * 2.0**-24, F)
    w[0, 1:4] *= -1
    q = quantize(w, q8(8))
    assert q.scales.astype(float) == 2.0**-24
    assert set(q.codes.unpack().ravel().tolist()) == {1, 255}


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        F,
        (2, 16),
        elements=st.one_of(
            st.floats(-5e5, 5e5, width=32),
            st.floats(-(2.0**-20), 2.0**-20, width=32),
            st.floats(-1, 1, width=32),
        ),
    )
)
def test_errors_are_bounded_at_every_magnitude(w):
    """By half a scale, or where the farthest weights are cut off by a little more, as the rule says."""
    for scheme, most in [(q4(8), 1.25), (zeros(4, 8), 1.0), (minimum(5, 8), 0.5)]:
        if scheme.coding == "minimum":
            w = np.clip(w, -6e4, 6e4)
        q = quantize(w, scheme)
        error = np.abs(q.dequantize().astype(np.float64) - w).reshape(2, 2, 8)
        scale = np.abs(q.scales.astype(np.float64))[:, :, None]
        slack = np.abs(w).max() * 2.0**-10 + 2.0**-25  # of the minimum in float16
        assert (error <= scale * (most + 0.001) + (slack if scheme.coding == "minimum" else 0)).all()


def squared_errors(q, w, unit, importance=1.0):
    return ((q.dequantize().astype(np.float64) - w) ** 2 * importance).reshape(len(w), -1, unit).sum(axis=2)


@pytest.mark.parametrize("scheme", [*PLAIN, *(f.kind for f in K_QUANTS)], ids=repr)
@pytest.mark.parametrize("weighted", [False, True])
def test_search_makes_no_group_worse_and_most_better(scheme, weighted):
    rng = np.random.default_rng(2)
    w = (rng.standard_t(5, (40, 512)) * 0.02).astype(F)
    importance = rng.uniform(0, 2, 512).astype(F) ** 4 if weighted else None
    counted = importance if weighted else 1.0
    unit = 256 if scheme.has_super_blocks else scheme.group_size
    rule = squared_errors(quantize(w, scheme), w, unit, counted)
    searched = squared_errors(quantize(w, scheme, search=True, importance=importance), w, unit, counted)
    assert (searched <= rule * 1.00001).all()
    assert searched.sum() < (0.97 if scheme.bits < 6 else 0.99) * rule.sum()


@pytest.mark.parametrize("scheme", [q4(32), zeros(4, 32), Scheme(3, 32)], ids=repr)
def test_search_comes_close_to_trying_every_scale(scheme):
    w = np.random.default_rng(3).normal(0, 1, (1, 32 * 20)).astype(F)
    found = squared_errors(quantize(w, scheme, search=True), w, 32)[0]
    top, best = (1 << scheme.bits) - 1, []
    for group in w.reshape(-1, 32).astype(np.float64):
        largest = np.abs(group).max()
        least = np.inf
        for scale in np.linspace(largest / top / 2, largest / top * 3, 1500):
            signs = (scale, -scale) if scheme.coding == "middle" else (scale,)
            for zero in [(top + 1) // 2] if scheme.coding == "middle" else range(top + 1):
                for s in signs:
                    rounded = np.clip(np.rint(group / s), -zero, top - zero) * s
                    least = min(least, ((rounded - group) ** 2).sum())
        best.append(least)
    assert found.sum() < 1.03 * np.sum(best)
    assert (found > 0.999 * np.array(best) - 1e-6).all()


def test_importance_moves_the_error_to_columns_that_count_less():
    w = np.random.default_rng(4).normal(0, 1, (64, 64)).astype(F)
    importance = np.where(np.arange(64) % 2, 1, 0).astype(F)
    q = quantize(w, q4(64), search=True, importance=importance)
    plain = quantize(w, q4(64), search=True)
    error, of_plain = ((x.dequantize() - w) ** 2 for x in (q, plain))
    assert error[:, 1::2].sum() < 0.97 * of_plain[:, 1::2].sum()
    assert error[:, ::2].sum() > of_plain[:, ::2].sum()


# By how much of the mean square normal weights are off, of each type: measured, and rounded up.
ERRORS = {
    "Q8_0": 4e-5, "Q4_0": 0.0068, "Q4_1": 0.0055, "Q5_0": 0.0018, "Q5_1": 0.0013,
    "Q2_K": 0.077, "Q3_K": 0.023, "Q4_K": 0.0056, "Q5_K": 0.0015, "Q6_K": 0.00036,
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_gguf_types_are_written_so_that_gguf_reads_what_was_rounded(name):
    block_format = next(f for f in formats().values() if f.name == name)
    w = np.random.default_rng(5).normal(0, 0.02, (16, 1024)).astype(F)
    for search in (False, True):
        q = quantize(w, block_format.kind, search=search)
        raw = block_format.pack(q)
        theirs = dequantize(raw, gguf.GGMLQuantizationType[name])
        assert theirs.tobytes() == q.dequantize().tobytes()
        again = block_format.unpack(raw.reshape(-1), w.shape)
        assert again.dequantize().tobytes() == theirs.tobytes()
    assert ((theirs - w) ** 2).mean() / (w**2).mean() < ERRORS[name]


@pytest.mark.parametrize("scheme", [*PLAIN, *(f.kind for f in K_QUANTS)], ids=repr)
@pytest.mark.parametrize("search", [False, True])
def test_groups_of_zeros_and_of_tiny_numbers(scheme, search):
    w = np.zeros((3, 512), F)
    w[1] = np.random.default_rng(6).normal(0, 1e-9, 512)
    w[2, 256:] = 1e-38
    q = quantize(w, scheme, search=search)
    assert np.isfinite(q.dequantize()).all()
    assert not q.dequantize()[0].any()
    assert np.abs(q.dequantize()).max() < 1e-6
    assert q.has_finite_scales


def test_a_large_matrix_needs_little_memory_beside_its_result():
    w = np.ones((2048, 2048), np.float16)
    for search in (False, True):
        tracemalloc.start()
        q = quantize(w, q4(64), search=search)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < q.nbytes + (6 << 20)


def test_parts_of_a_matrix_are_rounded_as_the_whole():
    w = np.random.default_rng(7).normal(0, 1, (700, 256)).astype(F)
    whole, part = quantize(w, q4(32), search=True), quantize(w[333:340], q4(32), search=True)
    assert whole[333:340].dequantize().tobytes() == part.dequantize().tobytes()


@pytest.mark.parametrize("scheme", [q8(32), q4(32), zeros(4, 32), minimum(4), K_QUANTS[2].kind], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(scheme, bad):
    w = np.ones((2, 256), F)
    w[1, 3] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        quantize(w, scheme)


@pytest.mark.parametrize(("scheme", "most"), [(q4(32), 8.25 * 65504), (zeros(4, 32), 15.5 * 65504)])
def test_too_large_for_a_float16_scale(scheme, most):
    w = np.full((1, 32), most, F)
    assert np.isfinite(quantize(w, scheme).dequantize()).all()
    with pytest.raises(UnsupportedError, match="too large for q4, whose float16 scale "):
        quantize(w * F(1.01), scheme)
    with pytest.raises(UnsupportedError, match="too large"):
        quantize(np.tile([F(3e38), F(-3e38)], 16)[None], scheme)
    assert np.isfinite(quantize(w * F(1.01), Scheme(4, 32, DType.float32)).dequantize()).all()


@pytest.mark.parametrize(
    ("w", "scheme", "options", "error", "message"),
    [
        (np.ones((2, 100), F), q4(32), {}, ShapeError, "groups of 32 do not divide rows of 100"),
        (np.ones((2, 128), F), K_QUANTS[0].kind, {}, ShapeError, "groups of 256 do not divide rows of 128"),
        (np.ones(32, F), q4(32), {}, ShapeError, "only a matrix"),
        (np.ones((0, 32), F), q4(32), {}, ShapeError, "not empty"),
        (np.ones((2, 32), np.int32), q4(32), {}, DTypeError, "int32"),
        (np.ones((2, 32), F), Scheme(8, 32, DType.float32, "e4m3"), {}, UnsupportedError, "e4m3"),
        (np.ones((2, 32), F), q4(32), {"importance": np.ones(31, F)}, ShapeError, "importance of 32"),
    ],
)
def test_what_is_refused(w, scheme, options, error, message):
    with pytest.raises(error, match=message):
        quantize(w, scheme, **options)


def test_columns_that_planes_of_bits_do_not_divide():
    w = np.random.default_rng(8).normal(0, 1, (3, 24)).astype(F)
    for scheme in (Scheme(5, 8), Scheme(4, 3), Scheme(4, 1)):
        assert (squared_errors(quantize(w, scheme), w, 24) < 1).all()
    assert quantize(w[:, :3], Scheme(4, 3)).codes.data.shape == (3, 3)


@pytest.mark.parametrize("scheme", PLAIN, ids=repr)
def test_result_takes_the_memory_of_its_bits(scheme):
    q = quantize(np.ones((4, 256), F), scheme)
    assert isinstance(q, QuantTensor)
    zeros = q.zeros.nbytes if q.zeros is not None else 0
    assert q.codes.data.nbytes == 4 * 256 * scheme.bits // 8
    assert q.nbytes == q.codes.data.nbytes + q.scales.nbytes + zeros
