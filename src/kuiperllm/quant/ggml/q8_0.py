"""GGUF's Q8_0: blocks of 32 weights, a float16 scale followed by 32 int8 values (34 bytes)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuiperllm.errors import UnsupportedError
from kuiperllm.quant.ggml.block import BlockFormat
from kuiperllm.quant.q8 import Q8Tensor

BLOCK_SIZE = 32
SCALE_BYTES = 2
BLOCK_BYTES = SCALE_BYTES + BLOCK_SIZE


def unpack(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Q8Tensor:
    """Split the blocks of a matrix [N, K] into int8 [N, K] and float16 [N, K / 32].

    Scales lie between the values, so both are copied: the values of a block as one item of 32 bytes, which
    is three times as fast as byte by byte.

    Raises:
        UnsupportedError: the tensor is not a matrix.
    """
    if len(shape) != 2:
        raise UnsupportedError(f"Q8_0 is supported for matrices, not for shape {shape}")
    rows, columns = shape
    blocks = raw.reshape(rows, columns // BLOCK_SIZE, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[:, :, :SCALE_BYTES].view(np.float16))
    values = np.ascontiguousarray(blocks[:, :, SCALE_BYTES:].view(f"V{BLOCK_SIZE}")).view(np.int8)
    return Q8Tensor(values.reshape(rows, columns), scales.reshape(rows, columns // BLOCK_SIZE))


FORMATS = (BlockFormat(8, "Q8_0", "q8", BLOCK_SIZE, BLOCK_BYTES, unpack),)
