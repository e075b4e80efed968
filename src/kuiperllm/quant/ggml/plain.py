"""GGUF tensors that are not quantized: float32, float16, bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.dtype import DType
from kuiperllm.quant.ggml.block import BlockFormat


def _plain(number: int, name: str, dtype: DType) -> BlockFormat:
    def unpack(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[Any]:
        return raw.view(dtype.numpy).reshape(shape)

    return BlockFormat(number, name, str(dtype), 1, dtype.itemsize, unpack)


FORMATS = (
    _plain(0, "F32", DType.float32),
    _plain(1, "F16", DType.float16),
    _plain(30, "BF16", DType.bfloat16),
)
