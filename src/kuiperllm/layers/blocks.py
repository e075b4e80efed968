"""The two halves of a decoder layer; each normalizes the residual stream itself and adds to it."""

from __future__ import annotations

from kuiperllm.config import ModelConfig
from kuiperllm.core import Tensor
from kuiperllm.layers.basic import Linear, RMSNorm, RotaryEmbedding
from kuiperllm.layers.weights import WeightLoader
from kuiperllm.ops.attention import Batch, LayerCache
from kuiperllm.ops.self_attention import self_attention


class SelfAttention:
    """Grouped-query attention with rotary positions.

    Args:
        config: the shape.
        weights: where `<name>.q_proj` and so on come from.
        name: such as `model.layers.0.self_attn`.
        norm: of the residual stream, in front of the projections.
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
        norm: RMSNorm,
        rotary: RotaryEmbedding,
        *,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm: bool,
    ) -> None:
        self.norm, self.rotary = norm, rotary
        self.scale = config.head_dim**-0.5
        q, kv, hidden = config.q_size, config.kv_size, config.hidden_size
        names = [f"{name}.{part}_proj" for part in "qkv"]
        self.qkv_proj = Linear.load(weights, names, [q, kv, kv], hidden, bias=qkv_bias)
        self.o_proj = Linear.load(weights, [f"{name}.o_proj"], [hidden], q, bias=o_bias)
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm = RMSNorm(weights, f"{name}.q_norm", config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(weights, f"{name}.k_norm", config.head_dim, config.rms_norm_eps)

    def __call__(self, residual: Tensor, cache: LayerCache, batch: Batch) -> None:
        """Attend from residual [T, D] and add the result to it."""
        qkv = self.qkv_proj.of_norm(residual, self.norm)  # [T, (H + 2K) d]
        self_attention(
            qkv,
            residual,
            cache,
            batch,
            self.o_proj.weight,
            cos_sin=self.rotary.table,
            scale=self.scale,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=self.norm.eps,
        )


class SwiGLU:
    """The feed-forward half: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(
        self, config: ModelConfig, weights: WeightLoader, name: str, norm: RMSNorm, *, bias: bool
    ) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.norm = norm
        names = [f"{name}.gate_proj", f"{name}.up_proj"]
        self.gate_up_proj = Linear.load(weights, names, [inner, inner], hidden, bias=bias)
        self.down_proj = Linear.load(weights, [f"{name}.down_proj"], [hidden], inner, bias=bias)

    def __call__(self, residual: Tensor) -> None:
        """Add the result for residual [T, D] to it."""
        gated = self.gate_up_proj.swiglu_of_norm(residual, self.norm)  # [T, F]
        self.down_proj.add_to(residual, gated)
