"""GGUF tensors that are not quantized: float32, float16, bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.dtype import DType
from kuiperllm.errors import DTypeError
from kuiperllm.quant.ggml.block import BlockFormat
from kuiperllm.quant.tensor import QuantTensor


def _plain(number: int, name: str, dtype: DType) -> BlockFormat:
    def unpack(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[Any]:
        return raw.view(dtype.numpy).reshape(shape)

    def pack(weight: NDArray[Any] | QuantTensor) -> NDArray[np.uint8]:
        if isinstance(weight, QuantTensor) or weight.dtype != dtype.numpy:
            found = weight.scheme if isinstance(weight, QuantTensor) else weight.dtype
            raise DTypeError(f"{name} holds {dtype}, not {found}")
        return np.ascontiguousarray(weight).view(np.uint8)

    return BlockFormat(number, name, dtype, 1, dtype.itemsize, unpack, pack)


FORMATS = (
    _plain(0, "F32", DType.float32),
    _plain(1, "F16", DType.float16),
    _plain(30, "BF16", DType.bfloat16),
)
