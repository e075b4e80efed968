"""A chat model of a few kilobytes with random weights, as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 100_000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 258,
}


def write_model(folder: Path, *, chat: bool = True, **changes: Any) -> Path:
    """Write the model.

    Args:
        folder: is made.
        chat: with a chat template.
        changes: to config.json alone, so that it may contradict the weights.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    safetensors.numpy.save_file(tensors(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    config: dict[str, Any] = {"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}
    if chat:
        config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, large enough that greedy text does not fall into one token at once."""
    rng = np.random.default_rng(seed)
    d, f, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], d)}
    for i in range(CONFIG["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            f"{p}input_layernorm.weight": (d,),
            f"{p}post_attention_layernorm.weight": (d,),
            f"{p}self_attn.q_proj.weight": (d, d),
            f"{p}self_attn.q_proj.bias": (d,),
            f"{p}self_attn.k_proj.weight": (kv, d),
            f"{p}self_attn.k_proj.bias": (kv,),
            f"{p}self_attn.v_proj.weight": (kv, d),
            f"{p}self_attn.v_proj.bias": (kv,),
            f"{p}self_attn.o_proj.weight": (d, d),
            f"{p}mlp.gate_proj.weight": (f, d),
            f"{p}mlp.up_proj.weight": (f, d),
            f"{p}mlp.down_proj.weight": (d, f),
        }
    shapes["model.norm.weight"] = (d,)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def tokenizer_json() -> str:
    """One token for each byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    native = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    native.add_special_tokens(SPECIALS)
    return str(native.to_str())
