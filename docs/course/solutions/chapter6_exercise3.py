"""GGUF's type TQ2_0: 256 weights that are -1, 0 or 1 times one scale.

A block has 66 bytes: 64 of codes, 2 bits each, and a float16 scale behind them. Of each half of the block,
byte i of 32 holds columns i, i + 32, i + 64 and i + 96. The code of -1 is 0, so 1 is the code of zero.
As a module of `kuiperllm.quant.ggml` it would be found by its `FORMATS`.
"""

from __future__ import annotations

import numpy as np

from kuiperllm.core.dtype import DType
from kuiperllm.errors import UnsupportedError
from kuiperllm.quant.codes import CodeLayout, Plane
from kuiperllm.quant.ggml.block import Blocks, GroupParts, quantized
from kuiperllm.quant.scheme import Scheme

BLOCK_SIZE, BLOCK_BYTES = 256, 66
ZERO = 1
SCHEME = Scheme(2, BLOCK_SIZE, DType.float16, "zeros")
LAYOUT = CodeLayout(BLOCK_SIZE, BLOCK_BYTES, (Plane(0, 2, 32),))


def read(blocks: Blocks) -> GroupParts:
    """The scale, and the zero point that the type has without saying so."""
    scales = blocks.view(np.uint16)[:, 32:33].copy().view(np.float16)
    return GroupParts(scales, np.full(scales.shape, ZERO, np.uint8))


def write(parts: GroupParts, blocks: Blocks) -> None:
    """The other way; another zero point has no place in the file."""
    if parts.zeros is None or (parts.zeros != ZERO).any():
        raise UnsupportedError(f"TQ2_0 holds zero points of {ZERO}")
    blocks.view(np.uint16)[:, 32:33] = parts.scales.view(np.uint16)


FORMATS = (quantized(35, "TQ2_0", SCHEME, LAYOUT, read, write),)
