"""A checkpoint of random weights, for timing a model of real shape without downloading one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kuiperllm.checkpoint.base import Checkpoint, TensorInfo, Weight
from kuiperllm.config import ModelConfig
from kuiperllm.core import DType

_PERIOD = 1 << 20


class RandomCheckpoint(Checkpoint):
    """Has every tensor that a model asks for, in the shape that it expects.

    Matrices are normal numbers of a size that keeps activations near 1, norms are 1. The rows of a matrix are
    overlapping pieces of a million numbers, so that a tensor takes neither time nor memory to make.

    Args:
        config: the shape of the model.
        dtype: what the weights are stored as.
        seed: of the numbers.
    """

    format = "random"

    def __init__(self, config: ModelConfig, dtype: DType = DType.bfloat16, seed: int = 0) -> None:
        self._made: dict[str, TensorInfo] = {}
        super().__init__(Path("random"), config, self._made)
        numbers = np.random.default_rng(seed).standard_normal(_PERIOD, np.float32)
        self._numbers = numbers.astype(dtype.numpy)
        self._dtype = dtype
        if not config.tie_word_embeddings:
            self.expect("lm_head.weight", (config.vocab_size, config.hidden_size))

    def expect(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The description of a tensor of this shape, which exists from now on."""
        size = int(np.prod(shape)) * self._dtype.itemsize
        info = self._made[name] = TensorInfo(name, str(self._dtype), shape, size)
        self.tensors = self._made
        return info

    def _load(self, info: TensorInfo) -> Weight:
        if "norm" in info.name:
            return np.ones(info.shape, self._dtype.numpy)
        scale = self._dtype.numpy.type(2.0 ** round(np.log2(info.shape[-1] ** -0.5)))  # exact
        numbers = self._numbers * scale
        if len(info.shape) == 1:
            return np.resize(numbers, info.shape)
        rows, columns = info.shape
        step = max(1, (_PERIOD - columns) // rows)
        if rows * step + columns > _PERIOD:
            return np.resize(numbers, info.shape)
        return as_strided(numbers, info.shape, (step * numbers.itemsize, numbers.itemsize))

    def _release(self, info: TensorInfo) -> None: ...

    def close(self) -> None:
        """There is no file to give up."""
