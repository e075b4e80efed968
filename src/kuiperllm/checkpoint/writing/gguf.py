"""A GGUF file: the network under llama.cpp's names, with the tokenizer in its header.

Source: docs/gguf.md of ggml-org/ggml (keys), and what llama.cpp's loader asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.gguf import LAYER_NAMES, MODEL_NAMES
from kuiperllm.checkpoint.gguf_config import ARCHITECTURES
from kuiperllm.checkpoint.gguf_file import DEFAULT_ALIGNMENT
from kuiperllm.checkpoint.writing.convert import Section
from kuiperllm.checkpoint.writing.gguf_header import Description, header
from kuiperllm.checkpoint.writing.layout import Constant, ExportLayout, packed
from kuiperllm.checkpoint.writing.storage import BlockStorage
from kuiperllm.config import ModelConfig, RopeScaling
from kuiperllm.quant import Scheme
from kuiperllm.quant.ggml import formats

_QUANTIZATION_VERSION = 2  # of the block formats
_ARCHITECTURE_OF = {known.model_type: name for name, known in ARCHITECTURES.items()}
_GGUF_NAMES = {theirs: ours for ours, theirs in (MODEL_NAMES | LAYER_NAMES).items()}
_F32 = 0


def storage_of(type_name: str) -> BlockStorage:
    """How tensors of ggml's type `F32`, `Q4_K` and so on lie in a file."""
    (block_format,) = (known for known in formats().values() if known.name == type_name)
    return BlockStorage(block_format)


def interleaved_heads(config: ModelConfig, name: str) -> int:
    """Heads whose rows a GGUF file of this architecture has in the interleaved order; 0 for none."""
    if not ARCHITECTURES[_ARCHITECTURE_OF[config.model_type]].interleaved:
        return 0
    if ".self_attn.q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".self_attn.k_proj." in name else 0


def lay_out(
    sections: Sequence[Section],
    config: ModelConfig,
    *,
    name: str,
    file_type: int,
    carried: Mapping[str, Any],
    divisors: NDArray[np.float32] | None = None,
) -> ExportLayout:
    """The file.

    Args:
        sections: its tensors, with `BlockStorage`, in the order that they are written in.
        config: the network.
        name: of the model, for people.
        file_type: `general.file_type`.
        carried: keys that are written as they are: `tokenizer.*`, and those of a source whose general keys
            are not replaced; its name is kept.
        divisors: what the rotary frequencies are divided by, float32 [head_dim / 2], with Llama 3's scaling.
    """
    described, placed = [], list[Section | Constant]()
    if divisors is not None:
        described.append(Description("rope_freqs.weight", divisors.shape, _F32, divisors.nbytes))
        placed.append(Constant(divisors))
    for section in sections:
        assert isinstance(section.storage, BlockStorage)
        number = section.storage.format.number
        described.append(Description(gguf_name(section.name), section.shape, number, section.nbytes))
        placed.append(section)
    ours = _general(sections, config, str(carried.get("general.name", name)), file_type)
    pairs = ours | _network(config) | {key: value for key, value in carried.items() if key not in ours}
    return ExportLayout([packed(None, header(pairs, described), placed, DEFAULT_ALIGNMENT)])


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor: `blk.0.attn_q.weight`."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{_GGUF_NAMES[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"


def _general(sections: Sequence[Section], config: ModelConfig, name: str, file_type: int) -> dict[str, Any]:
    pairs: dict[str, Any] = {
        "general.architecture": _ARCHITECTURE_OF[config.model_type],
        "general.type": "model",
        "general.name": name,
        "general.file_type": file_type,
    }
    if any(isinstance(section.storage.kind, Scheme) for section in sections):
        pairs["general.quantization_version"] = _QUANTIZATION_VERSION
    return pairs


def _network(config: ModelConfig) -> dict[str, Any]:
    """The keys of the architecture."""
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    architecture = _ARCHITECTURE_OF[config.model_type]
    return {f"{architecture}.{key}": value for key, value in (keys | _scaling(config.rope_scaling)).items()}


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Keys of rotary embedding for long contexts. Llama 3's rule is a tensor instead."""
    if scaling.rope_type not in ("linear", "yarn"):
        return {}
    keys: dict[str, Any] = {
        "rope.scaling.type": scaling.rope_type,
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
    }
    if scaling.rope_type == "yarn":
        keys["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        keys["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
        if scaling.attention_factor is not None:
            # GGUF multiplies YaRN's own factor, Hugging Face replaces it (Peng et al. 2023, eq. 22).
            own = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
            keys["rope.scaling.attn_factor"] = scaling.attention_factor / own
    return keys
