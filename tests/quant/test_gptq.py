"""GPTQ against the algorithm as its paper states it, and what it is for: products that change little."""

from __future__ import annotations

import numpy as np
import pytest

from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, ShapeError
from kuiperllm.quant import Scheme, q4, q8
from kuiperllm.quant.gptq import Feedback, gptq
from kuiperllm.quant.rounding import quantize

SCHEMES = [
    q8(64),
    q4(32),
    q4(128),
    q4(64, symmetric=False),
    Scheme(5, 32),
    Scheme(4, 32, DType.float16, "minimum"),
    Scheme(4, 32, DType.int8, "minimum"),
    Scheme(2, 16, DType.int8, "minimum"),
    Scheme(6, 16, DType.int8),
    q8(32, DType.float32),
]


def inputs(rng, tokens, columns, rank=None):
    """Of which some are far more important than others, and which depend on each other."""
    common = rng.standard_normal((tokens, rank or columns // 8)) @ rng.standard_normal(
        (rank or columns // 8, columns)
    )
    spread = np.exp(rng.standard_normal(columns) * 0.7)
    return ((common + 0.3 * rng.standard_normal((tokens, columns))) * spread).astype(np.float32)


def plain_gptq(w, hessian, scheme):
    """The algorithm of the paper without blocks, in float64: columns one by one, the most important first."""
    hessian = hessian.astype(np.float64)
    importance = np.diagonal(hessian).copy()
    order = np.argsort(-importance, kind="stable")
    hessian = hessian[np.ix_(order, order)] + 0.01 * importance.mean() * np.eye(len(order))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    grid = quantize(w, scheme, search=True, importance=importance.astype(np.float32))
    scales = np.repeat(grid.group_scales(), scheme.group_size, axis=1).astype(np.float64)
    values = w.astype(np.float64)[:, order]
    restored = np.empty_like(values)
    zero = grid.zeros if scheme.coding == "zeros" else np.full_like(grid.scales, scheme.middle, np.float64)
    zero = np.repeat(zero.astype(np.float64), scheme.group_size, axis=1)
    low = 1 if scheme.bits == 8 else 0
    for j, column in enumerate(order):
        s, z = scales[:, column], zero[:, column]
        codes = np.clip(np.rint(values[:, j] / s + z), low, (1 << scheme.bits) - 1)
        restored[:, column] = s * (codes - z)
        error = (values[:, j] - restored[:, column]) / upper[j, j]
        values[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return restored


def product_error(x, w, rounded):
    return float(np.linalg.norm(x @ (rounded - w).T) / np.linalg.norm(x @ w.T))


@pytest.mark.parametrize("columns", [64, 128, 320, 640])
def test_feedback_is_the_factor_of_the_inverse(columns):
    rng = np.random.default_rng(columns)
    x = inputs(rng, 2 * columns, columns)
    hessian = x.T @ x
    feedback = Feedback.of(hessian)
    assert (np.diff(feedback.importance[feedback.order]) <= 0).all()
    assert (feedback.importance == np.diagonal(hessian)).all()
    assert not np.tril(feedback.upper, -1).any()
    damped = hessian.astype(np.float64)[np.ix_(feedback.order, feedback.order)]
    damped += 0.01 * np.diagonal(hessian).mean() * np.eye(columns)
    product = feedback.upper.T.astype(np.float64) @ feedback.upper @ damped
    np.testing.assert_allclose(product, np.eye(columns), atol=2e-4)


@pytest.mark.parametrize("scheme", [q8(64), q4(32), q4(64, symmetric=False), Scheme(5, 32)], ids=str)
def test_codes_are_those_of_the_paper(scheme):
    rng = np.random.default_rng(0)
    x = inputs(rng, 1024, 256)
    w = rng.standard_normal((64, 256)).astype(np.float32)
    hessian = x.T @ x
    found = gptq(w, Feedback.of(hessian), scheme)
    expected = plain_gptq(w, hessian, scheme)
    # float32 decides some ties otherwise; what follows in that row is another way to as small an error.
    same = np.isclose(found.dequantize(), expected, atol=1e-6).mean()
    assert same > 0.97
    assert product_error(x, w, found.dequantize()) == pytest.approx(product_error(x, w, expected), rel=0.02)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_products_change_less_than_with_rounding_to_nearest(scheme):
    rng = np.random.default_rng(1)
    x = inputs(rng, 2048, 256)
    w = rng.standard_normal((96, 256)).astype(np.float32)
    found = gptq(w, Feedback.of(x.T @ x), scheme)
    assert found.scheme == scheme
    nearest = quantize(w, scheme, search=True).dequantize()
    assert product_error(x, w, found.dequantize()) < 0.5 * product_error(x, w, nearest)


def test_unseen_inputs_of_the_same_kind():
    rng = np.random.default_rng(2)
    x = inputs(rng, 4096, 256)
    w = rng.standard_normal((64, 256)).astype(np.float32)
    found = gptq(w, Feedback.of(x[:2048].T @ x[:2048]), q4(32)).dequantize()
    nearest = quantize(w, q4(32), search=True).dequantize()
    assert product_error(x[2048:], w, found) < 0.6 * product_error(x[2048:], w, nearest)


def test_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(3)
    x = inputs(rng, 512, 128)
    w = rng.standard_normal((50, 128)).astype(np.float32)
    feedback = Feedback.of(x.T @ x)
    whole = gptq(w, feedback, q4(32)).dequantize()
    parts = [gptq(w[rows], feedback, q4(32)).dequantize() for rows in (slice(0, 7), slice(7, 50))]
    assert np.mean(whole == np.concatenate(parts)) > 0.99


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_fewer_inputs_than_columns(tokens):
    """The sums are then singular, or zero: weights that no input reaches are rounded to the nearest code."""
    rng = np.random.default_rng(4)
    x = np.zeros((max(tokens, 1), 128), np.float32)
    x[:tokens, :64] = inputs(rng, 64, 64)[:tokens]
    w = rng.standard_normal((32, 128)).astype(np.float32)
    found = gptq(w, Feedback.of(x.T @ x), q8(64)).dequantize()
    assert np.isfinite(found).all()
    largest = np.abs(w).max() / 127
    assert np.abs(found[:, 64:] - w[:, 64:]).max() <= largest
    if tokens:
        nearest = quantize(w, q8(64)).dequantize()
        assert product_error(x[:tokens], w, found) < product_error(x[:tokens], w, nearest)


def test_sums_that_rounding_made_indefinite_are_damped_more():
    rng = np.random.default_rng(5)
    x = inputs(rng, 256, 128)
    hessian = x.T @ x - 0.05 * np.eye(128, dtype=np.float32) * np.trace(x.T @ x) / 128
    feedback = Feedback.of(hessian)
    assert np.isfinite(feedback.upper).all()


def test_groups_of_zeros():
    rng = np.random.default_rng(6)
    x = inputs(rng, 256, 128)
    w = rng.standard_normal((8, 128)).astype(np.float32)
    w[2] = 0
    w[:, 32:64] = 0
    for scheme in (q4(32), q4(32, symmetric=False), q8(32)):
        assert not gptq(w, Feedback.of(x.T @ x), scheme).dequantize()[2].any()


def test_bad_matrices():
    feedback = Feedback.of(np.eye(96, dtype=np.float32))
    with pytest.raises(ShapeError, match="groups of 64 do not divide rows of 96"):
        gptq(np.ones((2, 96), np.float32), feedback, q8(64))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        gptq(np.full((2, 96), np.nan, np.float32), feedback, q8(32))
