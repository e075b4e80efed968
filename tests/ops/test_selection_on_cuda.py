"""`sample`, `logprobs` and `argmax` on CUDA: mixed requests, strange logits, the shape of the grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kuiperllm.core import Device
from kuiperllm.ops.argmax import argmax
from kuiperllm.ops.argmax import reference as argmax_reference
from kuiperllm.ops.cases import to_tensors
from kuiperllm.ops.logprobs import logprobs
from kuiperllm.ops.logprobs import reference as logprobs_reference
from kuiperllm.ops.sample import reference, sample

INF, NAN = float("inf"), float("nan")


def requests(rng: np.random.Generator, logits: np.ndarray, **options: Any) -> dict[str, Any]:
    """Rows with parameters of their own; `options` fixes some for all of them."""
    rows, width = logits.shape
    choices: dict[str, tuple[list[float], type]] = {
        "temperature": ([0, 0.1, 0.7, 1, 5, 50, 1e-30, 1e30], np.float32),
        "top_k": ([0, -1, 1, 5, 50, width // 2, width, width + 3, 2**31 - 1], np.int32),
        "top_p": ([0, 0.1, 0.5, 0.9, 0.99, 1, 1], np.float32),
        "min_p": ([0, 0, 0, 0.01, 0.3, 1], np.float32),
    }
    return {
        "logits": logits,
        **{k: rng.choice(values, rows).astype(dtype) for k, (values, dtype) in choices.items()},
        "seeds": rng.integers(-(2**63), 2**63, rows, np.int64),
        "positions": rng.integers(0, 2**31, rows, np.int32),
        **{k: np.full(rows, value, choices[k][1]) for k, value in options.items()},
    }


def strange_logits(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Rows of every kind, that begin anywhere: narrow, wide, tied, masked, with NaN and infinities."""
    logits = rng.standard_normal((rows, width + 3)) * rng.choice([0.01, 1, 3, 20], (rows, 1))
    logits[::3] = np.round(logits[::3])
    for row, value, share in (
        (1, -INF, 0.4),
        (2, -1e30, 0.3),
        (3, NAN, 0.3),
        (4, INF, 0.1),
        (5, -INF, 1),
        (6, NAN, 1),
    ):
        logits[row::8][rng.random(logits[row::8].shape) < share] = value
    return logits.astype(np.float32)[:, :width]


@pytest.mark.parametrize("width", [1, 2, 37, 1000, 5003, 20_011])
def test_rows_that_ask_for_different_things(cuda: Device, width: int) -> None:
    rng = np.random.default_rng(width)
    call = requests(rng, strange_logits(rng, 48, width))
    np.testing.assert_array_equal(sample(**to_tensors(call, cuda)).numpy(), reference(**call))


@pytest.mark.parametrize(
    ("k", "p"), [(50, 0.5), (4999, 0.999), (4500, 0.7), (9000, 0.01), (9000, 1.0), (0, 0.05)]
)
def test_cuts_of_long_rows(cuda: Device, k: int, p: float) -> None:
    """Some leave the kernels more tokens between two cuts than their list holds."""
    rng = np.random.default_rng(k)
    logits = (rng.standard_normal((6, 20_003)) * 2).astype(np.float32)
    call = requests(rng, logits, temperature=1.0, top_k=k, top_p=p, min_p=0.0)
    np.testing.assert_array_equal(sample(**to_tensors(call, cuda)).numpy(), reference(**call))


def test_other_rows_do_not_matter(cuda: Device) -> None:
    """One row alone is shared by many blocks, one of many belongs to a single block."""
    rng = np.random.default_rng(5)
    call = requests(rng, (rng.standard_normal((40, 20_003)) * 4).astype(np.float32), temperature=5.0)
    tokens = sample(**to_tensors(call, cuda)).numpy()
    for row in range(0, 40, 7):
        alone = {name: array[row : row + 1] for name, array in call.items()}
        assert sample(**to_tensors(alone, cuda)).numpy()[0] == tokens[row]


def test_argmax_of_strange_logits(cuda: Device) -> None:
    logits = strange_logits(np.random.default_rng(0), 48, 9001)
    np.testing.assert_array_equal(
        argmax(to_tensors({"x": logits}, cuda)["x"]).numpy(), argmax_reference(logits)
    )


def test_logprobs_of_rows_without_a_distribution(cuda: Device) -> None:
    logits = np.zeros((4, 2100), np.float32)
    logits[0, 2050], logits[1, 3], logits[2] = NAN, INF, -INF
    call = to_tensors({"logits": logits, "token_ids": np.array([1, 2, 3, 4], np.int32)}, cuda)
    chosen, ids, values = (t.numpy() for t in logprobs(**call, k=5))
    assert np.isnan(chosen[:3]).all()
    assert np.isnan(values[:3]).all()
    assert ids[2].tolist() == [-1] * 5
    truth = logprobs_reference(logits[3:], np.array([4], np.int32), 5)
    for found, expected in zip((chosen[3:], ids[3:], values[3:]), truth, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
