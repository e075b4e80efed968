"""The decoder that all supported families are: Llama, with the differences stated by keyword."""

from __future__ import annotations

from collections.abc import Sequence

from kuiperllm.config import ModelConfig
from kuiperllm.core import DType, Tensor
from kuiperllm.layers import Embedding, Linear, RMSNorm, RotaryEmbedding, SelfAttention, SwiGLU, WeightLoader
from kuiperllm.ops.attention import Batch, LayerCache
from kuiperllm.ops.linear import activation_dtype
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.ops.take_rows import take_rows


class DecoderLayer:
    """Attention, then feed-forward, each on normalized input and added to the residual stream."""

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
        hidden, eps = config.hidden_size, config.rms_norm_eps
        norm = RMSNorm(weights, f"{name}.input_layernorm", hidden, eps)
        self.self_attn = SelfAttention(
            config,
            weights,
            f"{name}.self_attn",
            norm,
            rotary,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            qk_norm=qk_norm,
        )
        norm = RMSNorm(weights, f"{name}.post_attention_layernorm", hidden, eps)
        self.mlp = SwiGLU(config, weights, f"{name}.mlp", norm, bias=config.mlp_bias)

    def __call__(self, residual: Tensor, cache: LayerCache, batch: Batch) -> None:
        """Update the residual stream [T, D] in place."""
        self.self_attn(residual, cache, batch)
        self.mlp(residual)


class Decoder:
    """A decoder-only transformer with grouped-query attention, RMSNorm, SwiGLU and rotary positions.

    Args:
        config: the shape.
        weights: where the tensors come from.
        qkv_bias: q, k and v projections have biases.
        o_bias: the attention's output projection has one.
        qk_norm: each head of q and k is normalized before it is rotated.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightLoader,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        self.config = config
        self.device = weights.device
        vocab, hidden = config.vocab_size, config.hidden_size
        table = weights.matrix("model.embed_tokens", vocab, hidden)
        self.embed_tokens = Embedding(table)
        self.rotary = RotaryEmbedding(config, weights.device)
        self.layers = [
            DecoderLayer(
                config,
                weights,
                f"model.layers.{index}",
                self.rotary,
                qkv_bias=qkv_bias,
                o_bias=o_bias,
                qk_norm=qk_norm,
            )
            for index in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(weights, "model.norm", hidden, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = Linear(table) if tied else Linear.load(weights, ["lm_head"], [vocab], hidden)
        self.dtype = activation_dtype(self.layers[0].self_attn.o_proj.weight)
        """Type of the activations."""
        self.weight_bytes = weights.packed_bytes
        """Memory that all weights take."""
        self.bytes_per_token = self.weight_bytes - (0 if tied else table.nbytes)
        """Weights that a decode step reads: all but an embedding that is only looked up."""

    def forward(self, input_ids: Tensor, caches: Sequence[LayerCache], batch: Batch) -> Tensor:
        """One pass over T tokens of S sequences; returns what `logits` turns into logits, [T, D].

        Args:
            input_ids: int32 [T].
            caches: keys and values of each layer; those of these tokens are added.
            batch: which tokens belong to which sequence, and where their keys and values go.
        """
        residual = self.embed_tokens(input_ids, self.dtype)  # [T, D]
        for layer, cache in zip(self.layers, caches, strict=True):
            layer(residual, cache, batch)
        return residual

    def logits(self, residual: Tensor, batch: Batch, *, out: Tensor | None = None) -> Tensor:
        """Logits, float32 [S, V], for what follows the last token of each sequence."""
        last = residual if batch.last_tokens is None else take_rows(residual, batch.last_tokens)  # [S, D]
        return self.logits_of(last, out=out)

    def normalized(self, rows: Tensor) -> Tensor:
        """The last hidden state of some tokens, [S, D], from their rows of `forward`, [S, D]."""
        return rms_norm(rows, self.norm.weight, self.norm.eps)

    def logits_of(self, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Logits, float32 [S, V], for what follows some tokens, from their rows of `forward`, [S, D]."""
        return self.lm_head.of_norm(rows, self.norm, DType.float32, out=out)
