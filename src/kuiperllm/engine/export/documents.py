"""The configuration files of a Hugging Face folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from kuiperllm.checkpoint import Checkpoint
from kuiperllm.checkpoint.json_file import read_config
from kuiperllm.checkpoint.quantized import ours
from kuiperllm.checkpoint.writing.convert import Section
from kuiperllm.checkpoint.writing.safetensors import as_json
from kuiperllm.checkpoint.writing.storage import PlainStorage
from kuiperllm.config import GenerationDefaults, ModelConfig, RopeScaling
from kuiperllm.ops.rope.frequencies import frequency_divisors
from kuiperllm.quant import Scheme

_GENERATION_CONFIG = "generation_config.json"
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROPE_FIELDS = {
    "linear": ("rope_type", "factor"),
    "llama3": (
        "rope_type",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "freq_factors",
    ),
    "yarn": (
        "rope_type",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
    ),
}


def model_config(checkpoint: Checkpoint, sections: list[Section]) -> dict[str, Any]:
    """The contents of config.json: the source's own where it has one, else what is known of the network.

    Args:
        checkpoint: the source.
        sections: the tensors as they will be stored.

    Raises:
        KuiperError: the source's config.json cannot be read any more.
    """
    config = checkpoint.config
    path = _folder(checkpoint) / "config.json"
    if checkpoint.format == "safetensors" and path.is_file():
        raw = read_config(path)
    else:
        raw = {"architectures": [_CLASSES[config.model_type]], **_known(config)}
    for replaced in ("quantization_config", "dtype", "torch_dtype"):
        raw.pop(replaced, None)
    raw["tie_word_embeddings"] = config.tie_word_embeddings
    raw["torch_dtype"] = _main_float_type(sections)
    schemes = Counter(s.storage.kind for s in sections if isinstance(s.storage.kind, Scheme))
    if schemes:
        raw["quantization_config"] = ours.config_of(schemes.most_common(1)[0][0])
    return raw


def _known(config: ModelConfig) -> dict[str, Any]:
    raw = config.to_hf()
    raw.pop("rope_scaling", None)
    scaling = config.rope_scaling
    if scaling.rope_type != "default":
        values = {name: getattr(scaling, name) for name in _ROPE_FIELDS[scaling.rope_type]}
        if _follows_from_rule(config):
            values.pop("freq_factors", None)
        raw["rope_scaling"] = {name: value for name, value in values.items() if value is not None}
    return raw


def _follows_from_rule(config: ModelConfig) -> bool:
    """Whether divisors of frequencies, which a GGUF file states, are what Llama 3's rule gives."""
    scaling = config.rope_scaling
    if scaling.freq_factors is None:
        return True
    given = {f.name: getattr(scaling, f.name) for f in fields(scaling) if f.name != "freq_factors"}
    by_rule = frequency_divisors(config.head_dim, config.rope_theta, RopeScaling(**given))
    return bool(np.array_equal(by_rule, np.array(scaling.freq_factors, np.float32)))


def _main_float_type(sections: list[Section]) -> str:
    """What most of the floating-point weights are stored in."""
    count: Counter[str] = Counter()
    for section in sections:
        if isinstance(section.storage, PlainStorage):
            count[section.storage.name] += prod(section.shape)
    return count.most_common(1)[0][0] if count else "float16"


def generation_config(checkpoint: Checkpoint) -> dict[str, bytes]:
    """generation_config.json, if there is anything to say in it."""
    path = _folder(checkpoint) / _GENERATION_CONFIG
    if checkpoint.format == "safetensors" and path.is_file():
        return {_GENERATION_CONFIG: as_json(read_config(path))}
    if checkpoint.generation == GenerationDefaults():
        return {}
    known = {f.name: getattr(checkpoint.generation, f.name) for f in fields(GenerationDefaults)}
    known["eos_token_id"] = list(known.pop("eos_token_ids"))
    return {_GENERATION_CONFIG: as_json({name: value for name, value in known.items() if value})}


def _folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
