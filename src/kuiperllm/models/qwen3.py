"""Qwen3."""

from kuiperllm.config import ModelConfig
from kuiperllm.layers import WeightLoader
from kuiperllm.models.decoder import Decoder


def build(config: ModelConfig, weights: WeightLoader) -> Decoder:
    """Norms on each head of q and k; a config may ask for biases on all four attention projections."""
    bias = bool(config.attention_bias)
    return Decoder(config, weights, qkv_bias=bias, o_bias=bias, qk_norm=True)
