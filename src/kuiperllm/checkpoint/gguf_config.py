"""The configuration of a network from the keys of a GGUF file.

Source: docs/gguf.md of ggml-org/ggml (keys), and llama.cpp's loader for what absent keys mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.gguf_file import GgufFile
from kuiperllm.config import ModelConfig
from kuiperllm.errors import CheckpointError, ConfigError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Architecture:
    """A value of `general.architecture` that can be run."""

    model_type: str
    """Hugging Face's name."""
    interleaved: bool
    """Whether query and key rows are in the interleaved order (see `rotary`)."""


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2", interleaved=False),
    "qwen3": Architecture("qwen3", interleaved=False),
}

_FLOAT32_MAX = float(np.finfo(np.float32).max)
# An unset token id, as converters write it.
_NO_TOKEN = 0xFFFFFFFF
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
# The rule behind `rope_freqs.weight`; Llama 3.1 and 3.2 share these and differ in `factor` only.
_LLAMA3_RULE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(gguf: GgufFile) -> ModelConfig:
    """Translate the keys of a file.

    Raises:
        CheckpointError: the file contradicts itself.
        ConfigError: a key is missing, of the wrong type or out of range.
        UnsupportedError: the architecture, or something it asks for, is not supported.
    """
    keys = _Keys(gguf)
    architecture = ARCHITECTURES[keys.architecture]
    _refuse_unsupported(keys)
    heads, hidden_size = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", default=hidden_size // max(heads, 1))
    for same in ("attention.value_length", "rope.dimension_count"):
        if (size := keys.integer(same, default=head_dim)) != head_dim:
            raise UnsupportedError(
                f"{keys.where}: {keys.architecture}.{same}={size} differs from the head size {head_dim}, "
                "which is not supported"
            )
    raw = {
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(keys),
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", default=10000.0),
        "rope_scaling": _rope_scaling(keys, head_dim),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": _has_attention_bias(keys),
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "bos_token_id": keys.token("bos_token_id"),
        "eos_token_id": list(dict.fromkeys(t for key in _END_TOKENS if (t := keys.token(key)) is not None)),
    }
    return ModelConfig.from_hf(raw, where=keys.where)


class _Keys:
    """Typed access to the keys of the file's architecture."""

    def __init__(self, gguf: GgufFile) -> None:
        self.gguf = gguf
        self.where = str(gguf.file.path)
        architecture = gguf.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{self.where}: the architecture {brief(architecture)} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        self.architecture = architecture

    def get(self, key: str) -> Any:
        """The value of a key of the architecture; of a list that repeats one value per layer, that value."""
        value = self.gguf.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise UnsupportedError(
                    f"{self.where}: {self.architecture}.{key} differs between layers, which is not supported"
                )
            return value[0]
        return value

    def integer(self, key: str, *, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int:
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return _shortest(float(value))

    def token(self, key: str) -> int | None:
        value = self.gguf.metadata.get(f"tokenizer.ggml.{key}")
        return value if type(value) is int and 0 <= value < _NO_TOKEN else None

    def _wrong(self, key: str, value: object, expected: str) -> ConfigError:
        name = f"{self.where}: the key {self.architecture}.{key}"
        if value is None:
            return ConfigError(f"{name} is missing")
        return ConfigError(f"{name} must be {expected}, not {brief(value)}")


def _shortest(value: float) -> float:
    """The shortest decimal that is this number in float32, as files store it: 1e-5 and not 9.99999974e-06."""
    if abs(value) > _FLOAT32_MAX or float(np.float32(value)) != value:
        return value
    return float(str(np.float32(value)))


def _refuse_unsupported(keys: _Keys) -> None:
    if (experts := keys.integer("expert_count", default=0)) > 0:
        raise UnsupportedError(f"{keys.where}: a mixture of {experts} experts is not supported")
    if (files := keys.gguf.metadata.get("split.count", 1)) not in (0, 1):
        raise UnsupportedError(
            f"{keys.where}: is one of {brief(files)} parts; join them first with llama-gguf-split --merge"
        )
    window = keys.integer("attention.sliding_window", default=0)
    if 0 < window < keys.integer("context_length"):
        raise UnsupportedError(f"{keys.where}: sliding-window attention is not supported; full attention is")


def _vocab_size(keys: _Keys) -> int:
    tokens = keys.gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        if not isinstance(tokens[0], str):
            raise CheckpointError(
                f"{keys.where}: tokenizer.ggml.tokens must hold strings, not {brief(tokens)}"
            )
        return len(tokens)
    embedding = keys.gguf.tensors.get("token_embd.weight")
    return keys.integer("vocab_size", default=embedding.shape[0] if embedding else None)


def _has_attention_bias(keys: _Keys) -> bool | None:
    """None where the model family decides."""
    if keys.architecture == "qwen2":
        return None
    return any(f"blk.0.attn_{part}.bias" in keys.gguf.tensors for part in ("q", "k", "v", "output"))


def _rope_scaling(keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    """A `rope_scaling` object in Hugging Face's form."""
    if "rope_freqs.weight" in keys.gguf.tensors:
        divisors = _frequency_divisors(keys, head_dim)
        factor = max(1.0, *divisors)
        return {"rope_type": "llama3", "factor": factor, "freq_factors": divisors, **_LLAMA3_RULE}
    kind = keys.get("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", default=0.0) or keys.number("rope.scale_linear", default=0.0)
    if kind is None:
        kind = "linear" if factor > 1.0 else "none"
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(
            f"{keys.where}: rope scaling {brief(kind)} is not supported; supported: none, linear, yarn"
        )
    if kind == "none" or factor in (0.0, 1.0):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer(
            "rope.scaling.original_context_length", default=keys.integer("context_length")
        )
        scaling["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", default=32.0)
        scaling["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", default=1.0)
        # GGUF multiplies YaRN's own attention factor, Hugging Face replaces it (Peng et al. 2023, eq. 22).
        multiplier = keys.number("rope.scaling.attn_factor", default=1.0)
        if multiplier != 1.0:
            scaling["attention_factor"] = multiplier * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling


def _frequency_divisors(keys: _Keys, head_dim: int) -> list[float]:
    """The tensor that divides each of the head_dim / 2 rotary frequencies."""
    tensor = keys.gguf.tensors["rope_freqs.weight"]
    if tensor.shape != (head_dim // 2,) or tensor.format.name != "F32":
        raise CheckpointError(
            f"{keys.where}: rope_freqs.weight must be F32 of shape [{head_dim // 2}], "
            f"not {tensor.format.name} of shape {list(tensor.shape)}"
        )
    divisors = keys.gguf.file.array(tensor.offset, np.dtype(np.float32), tensor.shape)
    if not np.isfinite(divisors).all() or not (divisors > 0).all():
        raise CheckpointError(f"{keys.where}: rope_freqs.weight holds a value that is not a number above 0")
    return [float(value) for value in divisors]
