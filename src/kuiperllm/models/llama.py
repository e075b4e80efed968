"""Llama 2, TinyLlama, Llama 3, 3.1 and 3.2."""

from kuiperllm.config import ModelConfig
from kuiperllm.layers import WeightLoader
from kuiperllm.models.decoder import Decoder


def build(config: ModelConfig, weights: WeightLoader) -> Decoder:
    """The plain decoder; a config may ask for biases on all four attention projections."""
    bias = bool(config.attention_bias)
    return Decoder(config, weights, qkv_bias=bias, o_bias=bias)
