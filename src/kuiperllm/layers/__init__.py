"""Layers own weights and call operators. Models are made of them."""

from kuiperllm.layers.basic import Embedding, Linear, RMSNorm, RotaryEmbedding
from kuiperllm.layers.blocks import SelfAttention, SwiGLU
from kuiperllm.layers.weights import ShapeChecker, WeightLoader

__all__ = [
    "Embedding",
    "Linear",
    "RMSNorm",
    "RotaryEmbedding",
    "SelfAttention",
    "ShapeChecker",
    "SwiGLU",
    "WeightLoader",
]
