"""A checkpoint of random weights, for timing a model of real shape without downloading one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kuiperllm.checkpoint.base import Checkpoint, TensorInfo, Weight
from kuiperllm.config import ModelConfig
from kuiperllm.core import DType

_PERIOD = 1 << 20


class RandomCheckpoint(Checkpoint):
    """Normal weights of the size that keeps activations near 1; norms are 1, biases small.

    A period of a million numbers repeats, so that making a tensor costs no more than copying it.

    Args:
        config: the shape; `config.model_type` decides which biases and norms there are.
        dtype: what the weights are stored as.
        seed: of the numbers.
    """

    format = "random"

    def __init__(self, config: ModelConfig, dtype: DType = DType.bfloat16, seed: int = 0) -> None:
        infos = [_info(name, shape, dtype) for name, shape in tensor_shapes(config).items()]
        super().__init__(Path("random"), config, {info.name: info for info in infos})
        numbers = np.random.default_rng(seed).standard_normal(_PERIOD, np.float32)
        self._numbers = numbers.astype(dtype.numpy)
        self._dtype = dtype

    def _load(self, info: TensorInfo) -> Weight:
        if "norm" in info.name:
            return np.ones(info.shape, self._dtype.numpy)
        # scaled exactly, by a power of two, and cut at a place that differs between tensors
        scale = self._dtype.numpy.type(2.0 ** round(np.log2(info.shape[-1] ** -0.5)))
        start = hash(info.shape) % _PERIOD
        count = int(np.prod(info.shape))
        return np.resize(np.roll(self._numbers * scale, start), count).reshape(info.shape)

    def _release(self, info: TensorInfo) -> None: ...

    def close(self) -> None:
        """There is no file to give up."""


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model by name."""
    hidden, q, kv = config.hidden_size, config.q_size, config.kv_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    qkv_bias = config.attention_bias if config.attention_bias is not None else config.model_type == "qwen2"
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        for name, size in rows.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = (size, hidden)
            if qkv_bias:
                shapes[f"{layer}.self_attn.{name}.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        if config.attention_bias and config.model_type != "qwen2":
            shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        if config.model_type == "qwen3":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (config.intermediate_size, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (config.intermediate_size, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, config.intermediate_size)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _info(name: str, shape: tuple[int, ...], dtype: DType) -> TensorInfo:
    return TensorInfo(name, str(dtype), shape, int(np.prod(shape)) * dtype.itemsize)
