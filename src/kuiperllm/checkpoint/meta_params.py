"""Meta's params.json as a configuration in Hugging Face's terms.

Source: ModelArgs and model.py of meta-llama/llama and meta-llama/llama-models. The file says neither how long
a context the network was trained for, nor which tokens begin and end a text (the tokenizer knows those), nor
whether the embedding is also the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kuiperllm.checkpoint.base import brief
from kuiperllm.config import MAX_DIMENSION, MAX_LAYERS, ModelConfig
from kuiperllm.config.reader import FieldReader
from kuiperllm.errors import ConfigError, UnsupportedError

# Fields of networks that are not the plain decoder: adapters, quantization, images, experts and the like.
_UNSUPPORTED = (
    "attention_chunk_size",
    "lora_args",
    "moe",
    "moe_args",
    "nope_layer_interval",
    "quantization_args",
    "sliding_window",
    "use_qk_norm",
    "vision_args",
    "vision_chunk_size",
    "vision_model",
)
_LLAMA3_VOCABULARY = 100_000  # Llama 3's has 128,256 tokens, Llama 1's and 2's 32,000 and a few
_LLAMA3_CONTEXT = 8192


def config_of(
    params: Mapping[str, Any],
    where: str,
    *,
    vocab_size: int,
    intermediate_size: int,
    tied: bool,
    dtype: str,
) -> ModelConfig:
    """The configuration that params.json and the tensors state together.

    The context is `max_seq_len` if it is stated, else that of the family: 131,072 tokens with scaled rotary
    embedding (Llama 3.1 and later), 8,192 with the vocabulary of Llama 3, 16,384 with another rotary base
    than 10,000 (Code Llama), and 4,096 of Llama 2 (Llama 1 looks the same and was trained with 2,048).

    Args:
        params: the fields.
        where: the file that they come from, for messages.
        vocab_size: rows of the embedding.
        intermediate_size: rows of w1.
        tied: whether the output projection is the embedding.
        dtype: name of the matrices' data type.

    Raises:
        ConfigError: a field is missing, out of range or contradicts the tensors.
        UnsupportedError: the network needs something that is not implemented.
    """
    for name in _UNSUPPORTED:
        if params.get(name) not in (None, False, -1):
            raise UnsupportedError(f"{where}: {name}={brief(params[name])} is not supported")
    read = FieldReader(params, where)
    dim = read.integer("dim", low=1, high=MAX_DIMENSION)
    heads = read.integer("n_heads", low=1, high=min(dim, 65536))
    if params.get("head_dim") is None and dim % heads:
        raise ConfigError(f"{where}: dim={dim} is not a multiple of n_heads={heads}")
    _check_vocabulary(read, vocab_size)
    _check_intermediate_size(read, dim, intermediate_size)
    theta = read.number("rope_theta", default=10000.0, low=1.0)
    scaling = _rope_scaling(read, tied)
    if scaling is not None:
        context = 131072
    elif vocab_size >= _LLAMA3_VOCABULARY:
        context = _LLAMA3_CONTEXT
    else:
        context = 4096 if theta == 10000.0 else 16384
    raw = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": read.integer("n_layers", low=1, high=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": read.integer("n_kv_heads", default=heads, low=1, high=heads),
        "head_dim": read.integer("head_dim", default=dim // heads, low=1, high=65536),
        "max_position_embeddings": read.integer("max_seq_len", default=context, low=1, high=1 << 30),
        "rms_norm_eps": read.number("norm_eps", default=1e-5, low=0.0),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
    }
    return ModelConfig.from_hf(raw, where=where)


def feed_forward_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Rows of w1 by Meta's rule: two thirds of four times `dim`, scaled, and rounded up to a multiple."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * -(-size // multiple_of)


def _check_vocabulary(read: FieldReader, found: int) -> None:
    """Llama 2 says -1, which stands for the size of the tokenizer."""
    stated = read.integer("vocab_size", default=-1, low=-1, high=MAX_DIMENSION)
    if stated not in (-1, found):
        raise ConfigError(f"{read.where}: vocab_size={stated}, but tok_embeddings has {found} rows")


def _check_intermediate_size(read: FieldReader, dim: int, found: int) -> None:
    """Stated as `hidden_dim` in other projects' files of this form, else by the rule."""
    stated = read.integer("hidden_dim", default=found, low=1, high=MAX_DIMENSION)
    if read.raw.get("hidden_dim") is None and read.raw.get("multiple_of") is not None:
        multiple_of = read.integer("multiple_of", low=1, high=MAX_DIMENSION)
        scaled = read.raw.get("ffn_dim_multiplier") is not None
        stated = feed_forward_size(
            dim, multiple_of, read.number("ffn_dim_multiplier", low=0.0) if scaled else None
        )
    if stated != found:
        raise ConfigError(
            f"{read.where}: asks for {stated} rows of w1, but the files hold {found} of them; a shard is "
            "missing, or they are of different models"
        )


def _rope_scaling(read: FieldReader, tied: bool) -> dict[str, Any] | None:
    """The scaling of Llama 3.1 and later.

    Its numbers stand in Meta's code and not in the file, unless in the two fields that later code reads. The
    factor is 8 for Llama 3.1 and 3.3, and 32 for Llama 3.2, whose text models (1B, 3B) are the only ones with
    tied embeddings.
    """
    if not read.boolean("use_scaled_rope", default=False):
        return None
    return {
        "rope_type": "llama3",
        "factor": read.number("rope_scaling_factor", default=32.0 if tied else 8.0, low=1.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": read.number("rope_high_freq_factor", default=4.0, low=1e-6),
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
