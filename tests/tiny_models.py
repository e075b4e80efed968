"""Tiny checkpoints with a tokenizer of bytes, in the form of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

Weights = dict[str, np.ndarray]

BOS, EOS, USER, ASSISTANT = 256, 257, 258, 259
"""Token ids below 256 are bytes; these follow. Models have one row more, so that vocabularies are odd."""
SPECIALS = {"<s>": BOS, "</s>": EOS, "<|user|>": USER, "<|assistant|>": ASSISTANT}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model, under Hugging Face names."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    family, attention_bias = config["model_type"], config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        matrices = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            is_qkv = name.startswith("self_attn") and "o_proj" not in name
            if (
                (is_qkv and (family == "qwen2" or attention_bias))
                or (name.endswith("o_proj") and attention_bias)
                or ("mlp" in name and config.get("mlp_bias"))
            ):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        if family == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = (head,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (head,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """Norms around 1, biases and matrices of a size at which each part of the network matters."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if "norm" in name:
            weights[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            scale = 0.5 if name.endswith("bias") else 1.5 * shape[-1] ** -0.5
            weights[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    return weights


def chain_weights(config: Mapping[str, Any], following: Mapping[int, int]) -> Weights:
    """A model whose most likely next token depends on the last one only: `following` says which it is.

    Token embeddings are orthogonal, attention and feed-forward add nothing. Needs hidden_size >= vocab_size.
    """
    weights = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}
    for name in weights:
        if "norm" in name:
            weights[name][:] = 1
    vocab = config["vocab_size"]
    weights["model.embed_tokens.weight"][np.arange(vocab), np.arange(vocab)] = 1
    for token, successor in following.items():
        weights["lm_head.weight"][successor, token] = 1
    return weights


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Weights,
    *,
    dtype: Any = np.float32,
    template: bool = True,
) -> Path:
    """Config, weights and tokenizer in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    stored = {name: values.astype(dtype) for name, values in weights.items()}
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    write_tokenizer(folder, template=template)
    return folder


def write_tokenizer(folder: Path, *, template: bool = True, bos: bool = True) -> None:
    """Each byte is a token, and its value the id."""
    # GPT-2's printable stand-ins for bytes: those that print stand for themselves, the others follow at 256.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    native = tokenizers.Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    native.add_special_tokens(list(SPECIALS))
    native.save(str(folder / "tokenizer.json"))
    about: dict[str, Any] = {"eos_token": "</s>", "add_bos_token": bos}
    if bos:
        about["bos_token"] = "<s>"
    if template:
        about["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
