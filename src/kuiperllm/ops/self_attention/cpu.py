"""`self_attention` on the CPU: the operators it is made of."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.ops.attention import Batch, LayerCache, attention, write_kv
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.ops.rope import rope


def self_attention(
    qkv: Tensor,
    residual: Tensor,
    cache: LayerCache,
    batch: Batch,
    projection: LinearWeight,
    cos_sin: Tensor,
    scale: float,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    """Norms, rotation, cache, attention, projection, one after the other."""
    tokens, width = qkv.shape
    kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    parts = qkv.reshape((tokens, width // head_dim, head_dim))
    turned, v = parts[:, :-kv_heads], parts[:, -kv_heads:]
    q, k = turned[:, :-kv_heads], turned[:, -kv_heads:]
    if q_norm is not None and k_norm is not None:
        rms_norm(q, q_norm, eps, out=q)
        rms_norm(k, k_norm, eps, out=k)
    rope(turned, batch.positions, cos_sin)  # q and k at once
    write_kv(k, v, cache, batch.slot_mapping)
    mixed = attention(q, cache, batch, scale)  # [T, H, d]
    linear(mixed.reshape((tokens, projection.in_features)), projection, out=residual, accumulate=True)
