"""Checkpoints that contradict themselves are refused in one line, before anything is loaded."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kuiperllm import LLM, CheckpointError, Device, KuiperError, UnsupportedError
from kuiperllm.checkpoint.random import RandomCheckpoint
from kuiperllm.config import ModelConfig
from kuiperllm.layers import WeightLoader
from kuiperllm.models import build_model, supported_models
from tiny_models import BASE, Weights, random_weights, tensor_shapes, write_checkpoint

ATTENTION = "model.layers.1.self_attn."


def test_supported_models() -> None:
    assert supported_models() == ["llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("model_type", ["gpt2", "decoder", "../llama", "llama.x", "__init__"])
def test_unknown_model_types(tmp_path: Path, model_type: str) -> None:
    write_checkpoint(tmp_path, BASE | {"model_type": model_type}, random_weights(BASE))
    with pytest.raises(UnsupportedError, match=r"is not supported; supported: llama, qwen2, qwen3$"):
        LLM(tmp_path)


@pytest.mark.parametrize(
    "missing",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight",
        f"{ATTENTION}v_proj.weight",
        f"{ATTENTION}v_proj.bias",
        f"{ATTENTION}q_norm.weight",
    ],
)
def test_missing_tensors(tmp_path: Path, missing: str) -> None:
    family = "qwen2" if missing.endswith("bias") else "qwen3" if "q_norm" in missing else "llama"
    config = BASE | {"model_type": family}
    weights = random_weights(config)
    del weights[missing]
    refuse_without_loading(tmp_path, config, weights, f"no tensor '{missing}'")


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "vocab_size": lambda c: c | {"vocab_size": 260},
    "hidden_size": lambda c: c | {"hidden_size": 128},
    "intermediate_size": lambda c: c | {"intermediate_size": 80},
    "num_hidden_layers": lambda c: c | {"num_hidden_layers": 3},
    "num_attention_heads": lambda c: c | {"num_attention_heads": 8},
    "num_key_value_heads": lambda c: c | {"num_key_value_heads": 1},
    "head_dim": lambda c: c | {"head_dim": 32},
    "attention_bias": lambda c: c | {"attention_bias": True},
    "mlp_bias": lambda c: c | {"mlp_bias": True},
    "model_type": lambda c: c | {"model_type": "qwen3"},
}


@pytest.mark.parametrize("field", CONTRADICTIONS)
def test_configurations_that_do_not_fit_the_tensors(tmp_path: Path, field: str) -> None:
    weights = random_weights(BASE)
    refuse_without_loading(tmp_path, CONTRADICTIONS[field](BASE), weights, "tensor")


def test_a_config_that_promises_thousands_of_huge_layers(tmp_path: Path) -> None:
    config = BASE | {"num_hidden_layers": 4096, "intermediate_size": 1 << 24}
    before = resource.getrusage(resource.RUSAGE_SELF)
    refuse_without_loading(tmp_path, config, random_weights(BASE), "mlp.gate_proj")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 2
    assert after.ru_maxrss - before.ru_maxrss < 50_000  # KiB on Linux, bytes on macOS


def refuse_without_loading(folder: Path, config: dict[str, Any], weights: Weights, message: str) -> None:
    write_checkpoint(folder, config, weights)
    stats = Device("cpu").allocator.stats
    before = stats()
    with pytest.raises(CheckpointError) as caught:
        LLM(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert stats().peak_allocated_bytes == before.peak_allocated_bytes
    assert stats().num_reserves == before.num_reserves


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    weights = random_weights(BASE)
    weights[f"{ATTENTION}k_proj.weight"][3, 3] = float("nan")
    write_checkpoint(tmp_path, BASE, weights)
    with pytest.raises(KuiperError, match=r"weights of model\.layers\.1\.self_attn\.k_proj: a weight is NaN"):
        LLM(tmp_path, quant="q8")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_random_checkpoints_have_what_each_family_needs(family: str, tied: bool) -> None:
    config = BASE | {"model_type": family, "tie_word_embeddings": tied}
    checkpoint = RandomCheckpoint(ModelConfig.from_hf(config))
    started = time.process_time()
    model = build_model(checkpoint.config, WeightLoader(checkpoint, Device("cpu")))
    assert time.process_time() - started < 20
    shapes = tensor_shapes(config)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == shapes
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert model.bytes_per_token == model.weight_bytes - (0 if tied else model.embed_tokens.weight.nbytes)
