"""Sampling: the random numbers, the tokens that remain, and how often each is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.core import DType, Tensor
from kuiperllm.ops.sample import kept_weights, reference, sample
from kuiperllm.ops.sample.philox import philox, uniform

INF, NAN = float("inf"), float("nan")
DRAWS = 400


def arguments(logits: np.ndarray, *, heat: float = 1.0, k: int = 0, p: float = 1.0, least: float = 0.0,
              seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:  # fmt: skip
    """One row of logits, drawn from at consecutive positions."""
    return {
        "logits": np.broadcast_to(np.asarray(logits, np.float32), (draws, len(logits))),
        "temperature": np.full(draws, heat, np.float32),
        "top_k": np.full(draws, k, np.int32),
        "top_p": np.full(draws, p, np.float32),
        "min_p": np.full(draws, least, np.float32),
        "seeds": np.full(draws, seed, np.int64),
        "positions": np.arange(draws, dtype=np.int32),
    }


def draw(given_arguments: dict[str, Any]) -> np.ndarray:
    """Tokens from the kernel."""
    return sample(**{k: Tensor.from_numpy(v) for k, v in given_arguments.items()}).numpy()


def drawn(logits: np.ndarray, **options: Any) -> set[int]:
    return set(draw(arguments(logits, **options)).tolist())


def test_philox_known_answers() -> None:
    """The vectors of the authors' Random123 library."""
    ones = 0xFFFFFFFF
    assert philox([0] * 4, [0] * 2).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([ones] * 4, [ones] * 2).tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0])
    assert pi.tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_kernel_draws_with_philox() -> None:
    # of 2**16 equal logits, the token is the first 16 bits of the number
    flat = arguments(np.zeros(1 << 16), draws=1)
    assert draw(flat).tolist() == [0x6627]
    for seed, position in ((1, 0), (2**62 + 12345, 7), (-1, 2**31 - 1), (-(2**63), 3)):
        flat["seeds"], flat["positions"] = np.array([seed]), np.array([position], np.int32)
        words = philox([position, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
        assert draw(flat).tolist() == [words[0] >> 16]


def test_uniform_is_below_one() -> None:
    u = uniform(np.arange(5000, dtype=np.int64), np.zeros(5000, np.int32))
    assert (u >= 0).all()
    assert (u < 1).all()
    assert abs(u.mean() - 0.5) < 0.02


def test_seed_and_position_fix_the_draw() -> None:
    rng = np.random.default_rng(0)
    batch = arguments(rng.standard_normal(100), heat=1.5, p=0.95, seed=42)
    tokens = draw(batch)
    assert len(set(tokens.tolist())) > 10
    order = rng.permutation(DRAWS)
    np.testing.assert_array_equal(draw({k: v[order].copy() for k, v in batch.items()}), tokens[order])
    for i in (0, 17, 399):
        assert draw({k: v[i : i + 1].copy() for k, v in batch.items()})[0] == tokens[i]


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 90),
    values=st.sampled_from([0, 1, 2, 5]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    masked=st.integers(0, 3),
    k=st.sampled_from([0, 1, 2, 3, 7, 16, 40, 1000]),
    p=st.sampled_from([1.0, 0.99, 0.9, 0.71, 0.5, 0.13, 1e-6]),
    least=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_draws_are_those_of_the_reference(
    size: int, values: int, spread: float, masked: int, k: int, p: float, least: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, values, size) if values else rng.standard_normal(size) * spread
    logits = logits.astype(np.float32)
    logits[rng.choice(size, min(masked, size), replace=False)] = rng.choice([-INF, NAN])
    call = arguments(logits, k=k, p=p, least=least, seed=seed)
    tokens, expected = draw(call), reference(**call)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("size", [5000, 20_003])
@pytest.mark.parametrize(
    ("k", "p"), [(0, 0.9), (50, 1.0), (50, 0.5), (4999, 0.999), (4500, 0.7), (1, 0.5), (0, 0.05)]
)
def test_kept_tokens_of_long_rows(size: int, k: int, p: float) -> None:
    """Rows that are long enough for the kernel to go over to a list, and some that never do."""
    logits = (np.random.default_rng(k).standard_normal(size) * 2).astype(np.float32)
    call = arguments(logits, k=k, p=p, draws=250)
    tokens = draw(call)
    np.testing.assert_array_equal(tokens, reference(**call))
    kept = np.flatnonzero(kept_weights(logits.astype(np.float64), 1.0, k, np.float32(p), 0.0))
    assert set(tokens.tolist()) <= set(kept.tolist())


def test_ties_go_to_the_lower_token() -> None:
    logits = np.array([1, 2, 1, 2, 1, 1, 0], np.float32)
    assert drawn(logits, k=3) == {0, 1, 3}
    assert drawn(logits, k=4) == {0, 1, 2, 3}
    assert drawn(np.zeros(100), k=17) == set(range(17))
    assert drawn(np.zeros(10), p=0.5) == set(range(5))
    assert drawn(np.zeros(8), k=4, p=0.75) == {0, 1, 2}
    assert drawn(np.array([0.0, -0.0, -0.0, 0.0]), k=2) == {0, 1}


def test_top_p_counts_what_top_k_left() -> None:
    # 0.5, 0.25, 0.125, 0.125: after top_k=2 the first has two thirds
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    assert drawn(logits, p=0.6) == {0, 1}
    assert drawn(logits, k=2, p=0.6) == {0}
    assert drawn(logits, k=2, p=0.7) == {0, 1}
    assert drawn(logits, p=0.99) == {0, 1, 2, 3}
    assert drawn(logits, p=0.01) == {0}


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert drawn(logits, least=0.7) == {0, 1}
    assert drawn(logits, least=0.3) == {0, 1, 2}
    assert drawn(logits, least=1.0) == {0}
    assert drawn(np.zeros(5), least=1.0) == set(range(5))


@pytest.mark.parametrize("size", [4, 16, 50, 9000])
def test_special_logits(size: int) -> None:
    logits = np.full(size, -INF, np.float32)
    assert drawn(logits) == {0}
    assert drawn(np.full(size, NAN)) == {0}
    logits[[1, 3]] = 5.0
    assert drawn(logits) == {1, 3}
    assert drawn(logits, k=3, p=0.9) == {1, 3}
    logits[2] = NAN
    assert drawn(logits) == {1, 3}
    assert drawn(logits, heat=0.0) == {1}
    logits[[0, 3]] = INF
    assert drawn(logits) == {0, 3}
    assert drawn(logits, k=1) == {0}
    assert drawn(logits, heat=0.0) == {0}
    huge = np.zeros(size, np.float32)
    huge[[0, 2]], huge[1] = 3.4e38, -3.4e38
    assert drawn(huge, p=0.99) == {0, 2}
    assert drawn(huge, heat=1e-30) == {0, 2}


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([1.0, NAN, 3.0, 3.0, 2.0], np.float32)
    assert drawn(logits, heat=0.0) == {2}
    assert drawn(logits, heat=0.0, k=1, p=0.1, least=1.0) == {2}


@pytest.mark.parametrize(
    "options", [{}, {"heat": 0.5}, {"k": 5}, {"p": 0.8}, {"heat": 2.0, "k": 9, "p": 0.9, "least": 0.1}]
)
def test_frequencies_follow_the_probabilities(options: dict[str, Any]) -> None:
    """Pearson's chi-square, against the value that is exceeded once in a million."""
    logits = np.random.default_rng(3).standard_normal(12).astype(np.float32)
    draws = 20_000
    tokens = draw(arguments(logits, draws=draws, seed=7, **options))
    counts = np.bincount(tokens, minlength=12)
    weights = kept_weights(
        logits.astype(np.float64),
        options.get("heat", 1.0),
        options.get("k", 0),
        options.get("p", 1.0),
        options.get("least", 0.0),
    )
    expected = draws * weights / weights.sum()
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert freedom > 0
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 15  # above the 1 - 1e-6 quantile for 1 to 11


def test_out_is_filled() -> None:
    call = arguments(np.zeros(4))
    out = Tensor.zeros((DRAWS,), DType.int32)
    assert sample(**{k: Tensor.from_numpy(v) for k, v in call.items()}, out=out) is out
    np.testing.assert_array_equal(out.numpy(), reference(**call))
