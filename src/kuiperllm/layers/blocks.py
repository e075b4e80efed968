"""The two halves of a decoder layer."""

from __future__ import annotations

from kuiperllm.config import ModelConfig
from kuiperllm.core import Tensor
from kuiperllm.layers.basic import Linear, RMSNorm, RotaryEmbedding
from kuiperllm.layers.weights import WeightLoader
from kuiperllm.ops.attention import Batch, LayerCache, attention, write_kv
from kuiperllm.ops.silu_mul import silu_mul


class SelfAttention:
    """Grouped-query attention with rotary positions.

    Args:
        config: the shape.
        weights: where `<name>.q_proj` and so on come from.
        name: such as `model.layers.0.self_attn`.
        rotary: shared by all layers.
        qkv_bias: q, k and v have biases.
        o_bias: the output projection has one.
        qk_norm: each head of q and k is normalized before it is rotated.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightLoader,
        name: str,
        rotary: RotaryEmbedding,
        *,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm: bool,
    ) -> None:
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.rotary = rotary
        q, kv, hidden = config.q_size, config.kv_size, config.hidden_size
        names = [f"{name}.{part}_proj" for part in "qkv"]
        self.qkv_proj = Linear.load(weights, names, [q, kv, kv], hidden, bias=qkv_bias)
        self.o_proj = Linear.load(weights, [f"{name}.o_proj"], [hidden], q, bias=o_bias)
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm = RMSNorm(weights, f"{name}.q_norm", self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(weights, f"{name}.k_norm", self.head_dim, config.rms_norm_eps)

    def __call__(self, x: Tensor, residual: Tensor, cache: LayerCache, batch: Batch) -> None:
        """Attend from x [T, D] and add the result to residual [T, D]."""
        tokens, heads, kv_heads = x.shape[0], self.heads, self.kv_heads
        qkv = self.qkv_proj(x).reshape((tokens, heads + 2 * kv_heads, self.head_dim))
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(q, out=q)
            self.k_norm(k, out=k)
        self.rotary(qkv[:, : heads + kv_heads], batch.positions)  # q and k at once
        write_kv(k, v, cache, batch.slot_mapping)
        mixed = attention(q, cache, batch, self.head_dim**-0.5)  # [T, H, d]
        self.o_proj.add_to(residual, mixed.reshape((tokens, heads * self.head_dim)))


class SwiGLU:
    """The feed-forward half: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, weights: WeightLoader, name: str, *, bias: bool) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        names = [f"{name}.gate_proj", f"{name}.up_proj"]
        self.gate_up_proj = Linear.load(weights, names, [inner, inner], hidden, bias=bias)
        self.down_proj = Linear.load(weights, [f"{name}.down_proj"], [hidden], inner, bias=bias)

    def __call__(self, x: Tensor, residual: Tensor) -> None:
        """Add the result for x [T, D] to residual [T, D]."""
        self.down_proj.add_to(residual, silu_mul(self.gate_up_proj(x)))
