"""A plain NumPy decoder of the Llama and Qwen families, the truth to test other implementations against.

It is written from the papers and shares no code with the package: RMSNorm (Zhang and Sennrich 2019), rotary
embedding (Su et al. 2021) in Hugging Face's half-split form, grouped-query attention (Ainslie et al. 2023)
and SwiGLU (Shazeer 2020). No cache, no batching, one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x: Array, angles: Array) -> Array:
    """Turn each pair (x[i], x[i + d/2]) of [heads, T, d] by angles [T, d/2]."""
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def reference_logits(
    config: Any,
    weights: Mapping[str, Array],
    input_ids: Sequence[int],
    *,
    inv_freq: Array | None = None,
    dtype: Any = np.float32,
) -> Array:
    """Logits [T, V] for the token ids of one sequence.

    Args:
        config: an object with Hugging Face's names as attributes, such as a `ModelConfig`.
        weights: arrays under Hugging Face's names. Biases of projections (Qwen2) and norms of query and key
            heads (Qwen3) are applied where the dict has them; without `lm_head.weight` the embedding is used.
        input_ids: the token ids; the first stands at position 0.
        inv_freq: rotary frequencies [head_dim / 2], in radians per position, for models that scale them; by
            default rope_theta^(-2 i / head_dim).
        dtype: the floating-point type to compute in; np.float64 to measure rounding errors against.
    """
    head_dim, eps = config.head_dim, config.rms_norm_eps
    if inv_freq is None:
        inv_freq = config.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    length = len(input_ids)
    angles = np.arange(length)[:, None] * inv_freq
    future = np.triu(np.ones((length, length), dtype=bool), k=1)

    def weight(name: str) -> Array:
        return np.asarray(weights[name + ".weight"], dtype)

    def linear(x: Array, name: str) -> Array:
        y = x @ weight(name).T
        return y + np.asarray(weights[name + ".bias"], dtype) if name + ".bias" in weights else y

    def heads(x: Array, name: str, norm: str | None = None) -> Array:
        x = linear(x, name).reshape(length, -1, head_dim)
        if norm is not None and norm + ".weight" in weights:
            x = rms_norm(x, weight(norm), eps)
        return x.swapaxes(0, 1)  # [heads, T, d]

    def attention(x: Array, prefix: str) -> Array:
        q = rotate(heads(x, prefix + "q_proj", prefix + "q_norm"), angles)
        k = rotate(heads(x, prefix + "k_proj", prefix + "k_norm"), angles)
        v = heads(x, prefix + "v_proj")
        k, v = (np.repeat(t, len(q) // len(t), axis=0) for t in (k, v))  # one K/V head serves H/K query heads
        scores = q @ k.swapaxes(1, 2) / np.sqrt(head_dim).astype(dtype)  # [H, T, T]
        out = softmax(np.where(future, dtype(-np.inf), scores)) @ v  # [H, T, d]
        return linear(out.swapaxes(0, 1).reshape(length, -1), prefix + "o_proj")

    def mlp(x: Array, prefix: str) -> Array:
        gate, up = linear(x, prefix + "gate_proj"), linear(x, prefix + "up_proj")
        silu = gate * (1 + np.tanh(gate / 2)) / 2  # gate * sigmoid(gate), without the overflow of exp
        return linear(silu * up, prefix + "down_proj")

    x = weight("model.embed_tokens")[np.asarray(input_ids)]  # [T, D]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        x = x + attention(rms_norm(x, weight(prefix + "input_layernorm"), eps), prefix + "self_attn.")
        x = x + mlp(rms_norm(x, weight(prefix + "post_attention_layernorm"), eps), prefix + "mlp.")
    x = rms_norm(x, weight("model.norm"), eps)
    return linear(x, "lm_head" if "lm_head.weight" in weights else "model.embed_tokens")


def mean_nll(logits: Array, input_ids: Sequence[int]) -> float:
    """Mean negative log-likelihood, in nats, of each token but the first, given those before it."""
    targets = np.asarray(input_ids[1:])
    logits = logits[:-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = logits[np.arange(len(targets)), targets]
    return float(np.mean(np.log(np.exp(logits).sum(axis=-1)) - chosen))
