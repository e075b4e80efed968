"""Logits of every family against the NumPy reference decoder: prefill, pieces of a prompt, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kuiperllm.config import ModelConfig
from kuiperllm.core import Device, DType
from kuiperllm.ops.rope.frequencies import inverse_frequencies
from kuiperllm.quant.q8 import quantize_q8
from reference_llama import reference_logits
from stepping import Stepper
from tiny_models import BASE, Weights, random_weights, write_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-one-kv-head": {"num_key_value_heads": 1, "vocab_size": 263},
    "llama-explicit-head": {"head_dim": 20, "intermediate_size": 97},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama-3.1-rope": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2-tied-7-heads": {
        "model_type": "qwen2",
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-untied": {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 3},
}

PROMPT = np.random.default_rng(9).integers(0, 261, 80).tolist()


def make(folder: Path, name: str, **options: Any) -> tuple[dict[str, Any], Weights]:
    config = BASE | FAMILIES[name]
    weights = random_weights(config)
    write_checkpoint(folder, config, weights, **options)
    return config, weights


def expected(raw: dict[str, Any], weights: Weights, tokens: list[int]) -> np.ndarray:
    config = ModelConfig.from_hf(raw)
    inv_freq, _ = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return reference_logits(config, weights, tokens, inv_freq=inv_freq.astype(np.float64), dtype=np.float64)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_logits(tmp_path: Path, name: str, any_device: Device) -> None:
    raw, weights = make(tmp_path, name)
    truth = expected(raw, weights, PROMPT)
    stepper = Stepper(tmp_path, PROMPT, any_device, 256)
    found = [stepper.prefill(31), *(stepper.decode() for _ in range(31, 66))]
    assert stepper.sequence.num_computed == 66
    assert np.abs(np.array(found) - truth[30:66]).max() <= 1e-4


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_prompt_lengths_around_block_edges(tmp_path: Path, length: int, any_device: Device) -> None:
    raw, weights = make(tmp_path, "qwen3")
    truth = expected(raw, weights, PROMPT)
    stepper = Stepper(tmp_path, PROMPT, any_device, 256)
    found = [stepper.prefill(length), stepper.decode(), stepper.decode()]
    assert np.abs(np.array(found) - truth[length - 1 : length + 2]).max() <= 2e-4


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("piece", [1, 7, 32, 33])
def test_a_prompt_in_pieces(tmp_path: Path, block_size: int, piece: int, any_device: Device) -> None:
    raw, weights = make(tmp_path, "qwen2")
    truth = expected(raw, weights, PROMPT[:70])
    stepper = Stepper(tmp_path, PROMPT, any_device, 256, block_size=block_size)
    for first in range(0, 70, piece):
        last = min(70, first + piece)
        logits = stepper.prefill(last)
        assert np.abs(logits - truth[last - 1]).max() <= 2e-4


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square of the error, by that of the logits."""
    return float(np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)))


def run_both_ways(folder: Path, device: Device, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits at positions 32 to 71, each from a prompt taken in at once, and decoded step by step."""
    stepper = Stepper(folder, PROMPT, device, 256, **options)
    decoded = [stepper.prefill(33), *(stepper.decode() for _ in range(33, 72))]
    stepper = Stepper(folder, PROMPT, device, 256, **options)
    prefilled = [stepper.prefill(last) for last in range(33, 72, 3)]
    return np.array(decoded), np.array(prefilled)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-7-heads", "qwen3"])
def test_float16_weights(tmp_path: Path, name: str) -> None:
    """On the CPU weights are widened and multiplied in float32: with a float32 cache its bound holds."""
    raw, weights = make(tmp_path, name, dtype=np.float16)
    rounded = {k: v.astype(np.float16).astype(np.float32) for k, v in weights.items()}
    truth = expected(raw, rounded, PROMPT)
    decoded, prefilled = run_both_ways(tmp_path, Device("cpu"), kv_cache_dtype="float32")
    assert np.abs(decoded - truth[32:72]).max() <= 2e-4
    assert np.abs(prefilled - truth[32:71:3]).max() <= 2e-4
    # A float16 cache rounds keys and values to 11 bits: an error of at most 2**-12 of each, far less in sums.
    decoded, _ = run_both_ways(tmp_path, Device("cpu"))
    assert 2e-5 < relative_error(decoded, truth[32:72]) < 2**-10


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-7-heads", "qwen3"])
def test_bfloat16_weights(tmp_path: Path, name: str) -> None:
    """On the CPU. With several rows some processors round x to bfloat16 as well: up to 2**-9 of each factor.

    Errors of independent roundings, uniform within that, have a root mean square of 2**-9 / sqrt(3) = 0.11 %;
    the nine linear layers on the way to the logits make that 0.34 % in all, to which the network adds by
    dividing by norms and exponentiating scores. 1 % leaves room for that and for nothing else.
    """
    raw, weights = make(tmp_path, name, dtype=ml_dtypes.bfloat16)
    rounded = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in weights.items()}
    truth = expected(raw, rounded, PROMPT)
    decoded, prefilled = run_both_ways(tmp_path, Device("cpu"), kv_cache_dtype="float32")
    assert relative_error(decoded, truth[32:72]) < 0.01
    assert relative_error(prefilled, truth[32:71:3]) < 0.01
    decoded, _ = run_both_ways(tmp_path, Device("cpu"))
    assert relative_error(decoded, truth[32:72]) < 0.02


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-7-heads", "qwen3"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_q8_weights(tmp_path: Path, name: str, group_size: int) -> None:
    """On the CPU. Against the dequantized weights, so what is left is the rounding of x to int8 groups.

    A step is the largest of a group by 127. For normal numbers the largest of 32 to 64 is about 2.2 to 2.5
    standard deviations, the error of rounding to a step has a root mean square of step / sqrt(12), so each
    linear layer adds 2.5 / 127 / sqrt(12) = 0.6 %, nine of them 1.7 %. Norms and scores amplify that, hence
    three times as much. Rounding the weights alone changes the logits by as much again: so the comparison
    with the weights before rounding must come out worse.
    """
    raw, weights = make(tmp_path, name)
    rounded = {}
    for key, values in weights.items():
        group = next((g for g in (64, 32) if g <= group_size and values.shape[-1] % g == 0), 0)
        is_quantized = values.ndim == 2 and group
        rounded[key] = quantize_q8(values, group).dequantize() if is_quantized else values
    truth, unrounded = expected(raw, rounded, PROMPT), expected(raw, weights, PROMPT)
    decoded, prefilled = run_both_ways(tmp_path, Device("cpu"), quant="q8", group_size=group_size)
    error = relative_error(decoded, truth[32:72])
    assert error < 0.05
    assert error < 0.85 * relative_error(decoded, unrounded[32:72])
    assert relative_error(prefilled, truth[32:71:3]) < 0.05


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-tied-7-heads", "qwen3"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_16_bit_weights_on_a_gpu(tmp_path: Path, name: str, kind: str, cuda: Device) -> None:
    """Activations have the weights' type there, so each operator rounds its results once.

    A rounding to n bits of mantissa is off by at most 2**-(n + 1), 0.58 of that on the average: 2**-9 * 0.58
    = 0.11 % for bfloat16. On the way through two layers about 20 results follow each other (residual, q, k,
    v, scores' weights, mixed values, gates, both sums), 0.5 % in all if they are independent, and norms and
    scores amplify that: 2 % is the bound, an eighth of it for float16, which has 3 bits more.
    """
    dtype = DType(kind)
    raw, weights = make(tmp_path, name, dtype=dtype.numpy)
    rounded = {k: v.astype(dtype.numpy).astype(np.float32) for k, v in weights.items()}
    truth = expected(raw, rounded, PROMPT)
    decoded, prefilled = run_both_ways(tmp_path, cuda)
    bound = 0.02 if kind == "bfloat16" else 0.0025
    assert relative_error(decoded, truth[32:72]) < bound
    assert relative_error(prefilled, truth[32:71:3]) < bound


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_q8_weights_on_a_gpu(tmp_path: Path, name: str, cuda: Device) -> None:
    """Activations are bfloat16, and so are weights times scales on the way to tensor cores: a little above
    what bfloat16 weights give."""
    raw, weights = make(tmp_path, name)
    rounded = {
        key: quantize_q8(values, 32).dequantize() if values.ndim == 2 else values
        for key, values in weights.items()
    }
    truth = expected(raw, rounded, PROMPT)
    decoded, prefilled = run_both_ways(tmp_path, cuda, quant="q8", group_size=32)
    assert relative_error(decoded, truth[32:72]) < 0.025
    assert relative_error(prefilled, truth[32:71:3]) < 0.025
