"""Logits and greedy tokens against transformers, on tiny random checkpoints that it writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuiperllm.core import Device
from stepping import Stepper

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")

BASE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-2-one-kv-head": ("Llama", {"num_key_value_heads": 1, "hidden_size": 48}),
    "llama-3.1": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}),
    "llama-3.2-tied": (
        "Llama",
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 32},
    ),
    "llama-linear-rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-yarn-rope": ("Llama", {"rope_scaling": YARN_ROPE}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-head": ("Llama", {"head_dim": 20, "vocab_size": 301, "intermediate_size": 97}),
    "qwen2.5": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen2.5-7-heads": (
        "Qwen2",
        {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112, "vocab_size": 311},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3-wide-head": ("Qwen3", {"head_dim": 48, "num_attention_heads": 6, "num_key_value_heads": 3}),
}


def make_checkpoint(folder: Path, name: str, seed: int) -> Any:
    """Write a random checkpoint with transformers and return its model."""
    family, changes = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**{**BASE, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, safe_serialization=True)
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    tmp_path: Path, name: str, seed: int, any_device: Device
) -> None:
    model = make_checkpoint(tmp_path, name, seed)
    rng = np.random.default_rng(seed)
    length = (31, 33)[seed]  # around the edge of a block of the cache
    prompt = rng.integers(3, 300, length).tolist()

    stepper = Stepper(tmp_path, prompt, any_device, 512, dtype="float32")
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = expected.sequences[0, length:].tolist()
    worst = 0.0
    found = []
    logits = stepper.prefill(length)
    for step, wanted in enumerate(expected.logits):
        worst = max(worst, float(np.abs(logits - wanted[0].numpy()).max()))
        # transformers suppresses the end-of-text token below min_new_tokens
        scores = logits.copy()
        scores[2] = -np.inf
        found.append(int(scores.argmax()))
        logits = stepper.decode(tokens[step])
    assert worst <= 2e-4
    assert found == tokens


@pytest.mark.parametrize("name", ["llama-3.2-tied", "qwen2.5", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_a_prompt_taken_in_pieces_gives_the_same_logits(
    tmp_path: Path, name: str, chunk: int, any_device: Device
) -> None:
    model = make_checkpoint(tmp_path, name, seed=2)
    prompt = np.random.default_rng(3).integers(3, 300, 70).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].numpy()
    stepper = Stepper(tmp_path, prompt, any_device, 512, dtype="float32")
    logits = None
    for first in range(0, 70, chunk):
        logits = stepper.prefill(min(70, first + chunk))
    assert logits is not None
    assert np.abs(logits - expected).max() <= 2e-4
