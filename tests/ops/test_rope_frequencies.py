"""Rotary frequencies: values worked out by hand, and transformers' own."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kuiperllm.config import RopeScaling
from kuiperllm.errors import ConfigError
from kuiperllm.ops.rope.frequencies import cos_sin_table, inverse_frequencies

LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192)
YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32768)
SCALINGS = {
    "default": RopeScaling(),
    "linear": RopeScaling("linear", factor=2.5),
    "llama3": LLAMA3,
    "llama3-32": RopeScaling("llama3", factor=32.0, original_max_position_embeddings=8192),
    "yarn": YARN,
    "yarn-attention": RopeScaling("yarn", 8.0, 4096, beta_fast=16.0, beta_slow=2.0, attention_factor=0.75),
    "yarn-short": RopeScaling("yarn", factor=2.0, original_max_position_embeddings=16),
}


def test_default_is_a_geometric_sequence() -> None:
    frequencies, factor = inverse_frequencies(8, 10000.0)
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-7)
    assert frequencies.dtype == np.float32
    assert factor == 1.0


def test_linear_divides_all() -> None:
    frequencies, _ = inverse_frequencies(8, 10000.0, RopeScaling("linear", factor=4.0))
    np.testing.assert_allclose(frequencies, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-7)


def test_llama3_by_hand() -> None:
    # With theta = 10**8 and d = 8: 1, 0.01, 1e-4, 1e-6. Of these 1 and 0.01 make more than four turns in 8192
    # positions and stay; 1e-6 makes less than one and is divided by 8; so is 1e-4 (0.13 turns).
    frequencies, _ = inverse_frequencies(8, 1e8, LLAMA3)
    np.testing.assert_allclose(frequencies, [1, 0.01, 1.25e-5, 1.25e-7], rtol=1e-6)
    # a pair that makes 2.5 turns is half way between
    context = round(2.5 * 2 * math.pi * 1000)
    middle = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=context)
    frequencies, _ = inverse_frequencies(4, 1e6, middle)
    np.testing.assert_allclose(frequencies[1], 1e-3 * (0.5 / 8 + 0.5), rtol=1e-4)


def test_divisors_replace_the_rule() -> None:
    scaling = RopeScaling("llama3", freq_factors=(1.0, 2.0))
    np.testing.assert_allclose(inverse_frequencies(4, 100.0, scaling)[0], [1, 0.05], rtol=1e-7)
    with pytest.raises(ConfigError, match=r"^rope_scaling.freq_factors has 2 divisors; a head of 8 elements"):
        inverse_frequencies(8, 100.0, scaling)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    frequencies, factor = inverse_frequencies(128, 1e6, YARN)
    plain, _ = inverse_frequencies(128, 1e6)
    # 32 turns in 32768 positions: index 128 ln(32768 / 64 pi) / (2 ln 1e6) = 23.6; one turn: 39.6
    np.testing.assert_array_equal(frequencies[:24], plain[:24])
    np.testing.assert_allclose(frequencies[40:], plain[40:] / 4, rtol=1e-6)
    ramp = (30 - 23) / (40 - 23)
    np.testing.assert_allclose(frequencies[30], plain[30] * (1 - ramp + ramp / 4), rtol=1e-6)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    with pytest.raises(ConfigError, match=r"^rope_theta=1.0: yarn needs a base above 1$"):
        inverse_frequencies(128, 1.0, YARN)


def test_table_holds_cosines_then_sines() -> None:
    table = cos_sin_table(8, 10000.0, 5000, RopeScaling("yarn", 2.0, 4096, attention_factor=0.5))
    frequencies, _ = inverse_frequencies(8, 10000.0, RopeScaling("yarn", 2.0, 4096))
    assert table.shape == (5000, 8)
    assert table.dtype == np.float32
    for position in (0, 1, 4095, 4096, 4999):
        angles = position * frequencies.astype(np.float64)
        expected = np.concatenate([np.cos(angles), np.sin(angles)]) * 0.5
        np.testing.assert_allclose(table[position], expected, atol=2e-4)  # frequencies are rounded here


@pytest.mark.oracle
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_agrees_with_transformers(name: str, theta: float, head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    parameters = {"rope_type": scaling.rope_type, "rope_theta": theta}
    if scaling.rope_type != "default":
        parameters["factor"] = scaling.factor
    if scaling.rope_type in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        parameters.update(low_freq_factor=scaling.low_freq_factor, high_freq_factor=scaling.high_freq_factor)
    if scaling.rope_type == "yarn":
        parameters.update(beta_fast=scaling.beta_fast, beta_slow=scaling.beta_slow)
        if scaling.attention_factor is not None:
            parameters["attention_factor"] = scaling.attention_factor
    context = max(1, int(scaling.original_max_position_embeddings * scaling.factor)) or 4096
    config = transformers.LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters=parameters,
    )
    truth = LlamaRotaryEmbedding(config)
    frequencies, attention_factor = inverse_frequencies(head_dim, theta, scaling)
    np.testing.assert_allclose(frequencies, truth.inv_freq.numpy(), rtol=2e-6)
    assert attention_factor == pytest.approx(truth.attention_scaling)
