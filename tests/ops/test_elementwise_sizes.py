"""Row-wise operators at every size around the edges of vectors, and with special values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.core import DType, Tensor
from kuiperllm.ops import add, argmax, logprobs, rms_norm, rope, silu_mul, softmax
from kuiperllm.ops.rms_norm import rms_norm as norm

INF, NAN = float("inf"), float("nan")


def rows(rng: np.random.Generator, tokens: int, width: int, padding: int) -> np.ndarray:
    return rng.standard_normal((tokens, width + padding), np.float32)[:, :width]


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "add": (add.add, add.reference, lambda r, t, w, p: {"x": rows(r, t, w, p), "y": rows(r, t, w, 0)}),
    "rms_norm": (
        rms_norm.rms_norm,
        rms_norm.reference,
        lambda r, t, w, p: {"x": rows(r, t, w, p), "weight": rows(r, 1, w, 0)[0], "eps": 1e-5},
    ),
    "silu_mul": (
        silu_mul.silu_mul,
        silu_mul.reference,
        lambda r, t, w, p: {"gate_up": rows(r, t, 2 * w, p) * np.float32(4)},
    ),
    "softmax": (softmax.softmax, softmax.reference, lambda r, t, w, p: {"x": rows(r, t, w, p)}),
    "argmax": (argmax.argmax, argmax.reference, lambda r, t, w, p: {"x": np.rint(rows(r, t, w, p))}),
    "logprobs": (
        logprobs.logprobs,
        logprobs.reference,
        lambda r, t, w, p: {
            "logits": rows(r, t, w, p),
            "token_ids": r.integers(0, w, t, np.int32),
            "k": min(w, p),
        },
    ),
    "rope": (
        rope.rope,
        rope.reference,
        lambda r, t, w, p: {
            "x": rows(r, t, 4 * w, p).reshape(t, 2, 2 * w) if not p else rows(r, t, 2 * w, p)[:, None, :],
            "positions": r.integers(0, 9, t, np.int32),
            "cos_sin": rows(r, 9, 2 * w, p),
            "interleaved": bool(p & 1),
        },
    ),
}


@pytest.mark.parametrize("name", CALLS)
@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 70), tokens=st.integers(1, 5), padding=st.integers(0, 5), seed=st.integers(0, 9999)
)
def test_any_size(name: str, width: int, tokens: int, padding: int, seed: int) -> None:
    function, reference, make = CALLS[name]
    arguments = make(np.random.default_rng(seed), tokens, width, padding)
    expected = reference(**arguments)
    tensors = {k: Tensor.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    found = function(**tensors)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for tensor, array in pairs:
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 65])
def test_nothing_outside_the_rows_is_touched(width: int) -> None:
    rng = np.random.default_rng(0)
    for name in ("add", "rms_norm", "silu_mul", "softmax"):
        function, reference, make = CALLS[name]
        arguments = make(rng, 3, width, 2)
        memory = Tensor.full((3, width + 5), 7.0)
        tensors = {k: Tensor.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        out = memory[:, 2 : 2 + width]
        assert function(**tensors, out=out) is out
        np.testing.assert_allclose(out.numpy(), reference(**arguments), rtol=1e-5, atol=1e-6)
        assert (memory.numpy()[:, :2] == 7).all()
        assert (memory.numpy()[:, 2 + width :] == 7).all()


def test_in_place() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 40), np.float32), rng.standard_normal(40, np.float32)
    tensor = Tensor.from_numpy(x.copy())
    norm(tensor, Tensor.from_numpy(weight), 1e-5, out=tensor)
    np.testing.assert_allclose(tensor.numpy(), rms_norm.reference(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    tensor = Tensor.from_numpy(x.copy())
    softmax.softmax(tensor, out=tensor)
    np.testing.assert_allclose(tensor.numpy(), softmax.reference(x), rtol=1e-5, atol=1e-7)
    tensor = Tensor.from_numpy(x.copy())
    add.add(tensor, tensor, out=tensor)
    np.testing.assert_array_equal(tensor.numpy(), x + x)


def test_no_rows() -> None:
    none = Tensor.zeros((0, 8))
    assert add.add(none, none).shape == (0, 8)
    assert norm(none, Tensor.zeros((8,)), 1e-5).shape == (0, 8)
    assert softmax.softmax(none).shape == (0, 8)
    assert silu_mul.silu_mul(none).shape == (0, 4)
    assert argmax.argmax(none).shape == (0,)
    assert softmax.softmax(Tensor.zeros((3, 0))).shape == (3, 0)


@pytest.mark.parametrize("width", [3, 16, 40])
def test_nan_and_infinity_pass_through_sums(width: int) -> None:
    x = np.ones((2, width), np.float32)
    x[0, 1], x[1, 2] = NAN, INF
    found = add.add(Tensor.from_numpy(x), Tensor.from_numpy(np.ones_like(x))).numpy()
    np.testing.assert_array_equal(found, x + 1)
    found = norm(Tensor.from_numpy(x), Tensor.from_numpy(np.ones(width, np.float32)), 1e-5).numpy()
    assert np.isnan(found[0]).all()
    assert np.isnan(found[1, 2])
    assert (np.delete(found[1], 2) == 0).all()


@pytest.mark.parametrize("width", [4, 17])
def test_special_values_of_silu(width: int) -> None:
    gate_up = np.ones((1, 2 * width), np.float32)
    gate_up[0, :4] = [NAN, INF, 0.0, -200.0]
    found = silu_mul.silu_mul(Tensor.from_numpy(gate_up)).numpy()[0]
    assert np.isnan(found[0])
    assert found[1] == INF
    assert found[2] == 0
    assert abs(found[3]) < 1e-35


@pytest.mark.parametrize("width", [4, 16, 33])
def test_special_values_of_softmax(width: int) -> None:
    x = np.zeros((5, width), np.float32)
    x[0, 1], x[1, 1], x[2], x[3, 1:] = NAN, INF, -INF, -INF
    x[4] = 3e38
    found = softmax.softmax(Tensor.from_numpy(x)).numpy()
    assert np.isnan(found[:3]).any(axis=1).all()
    np.testing.assert_array_equal(found[3], [1] + [0] * (width - 1))
    np.testing.assert_allclose(found[4], 1 / width, rtol=1e-6)


@pytest.mark.parametrize("width", [5, 16, 70, 40_000])
def test_special_values_of_argmax(width: int) -> None:
    x = np.full((7, width), -1.0, np.float32)
    x[0] = NAN
    x[1], x[1, 3] = NAN, -INF
    x[2] = -INF
    x[3, 0], x[3, 4] = NAN, 5.0
    x[4, [2, 4]] = INF
    x[5, 1], x[5, 3] = -0.0, 0.0
    x[6, -1] = 0.0
    found = argmax.argmax(Tensor.from_numpy(x))
    assert found.dtype is DType.int32
    assert found.tolist() == [0, 3, 0, 4, 2, 1, width - 1]


def test_positions_outside_the_table_are_taken_for_the_nearest() -> None:
    rng = np.random.default_rng(0)
    x, table = rng.standard_normal((4, 1, 8), np.float32), rng.standard_normal((3, 8), np.float32)
    tensor = Tensor.from_numpy(x.copy())
    rope.rope(tensor, Tensor.from_numpy(np.array([-5, 0, 2, 2**30], np.int32)), Tensor.from_numpy(table))
    expected = rope.reference(x, np.array([0, 0, 2, 2]), table)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6)
