"""Qwen 1.5, Qwen2 and Qwen2.5."""

from kuiperllm.config import ModelConfig
from kuiperllm.layers import WeightLoader
from kuiperllm.models.decoder import Decoder


def build(config: ModelConfig, weights: WeightLoader) -> Decoder:
    """Biases on q, k and v."""
    return Decoder(config, weights, qkv_bias=True)
