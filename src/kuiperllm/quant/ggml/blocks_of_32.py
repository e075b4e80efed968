"""GGUF's Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 weights that begin with a float16 scale.

Types ending in 0 are symmetric; those ending in 1 have a float16 minimum after the scale, which is added.
Source: the block structs of ggml's `ggml-common.h`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.dtype import DType
from kuiperllm.quant.codes import CodeLayout, Plane
from kuiperllm.quant.ggml.block import Blocks, GroupParts, quantized
from kuiperllm.quant.scheme import Scheme, q8

BLOCK_SIZE = 32
_SIGN = np.uint16(0x8000)


def _halves(blocks: Blocks) -> NDArray[np.uint16]:
    """Blocks as 16-bit words; all have an even number of bytes."""
    return blocks.view(np.uint16)


def _read_scale(blocks: Blocks) -> GroupParts:
    return GroupParts(_halves(blocks)[:, :1].copy().view(np.float16))


def _write_scale(parts: GroupParts, blocks: Blocks) -> None:
    _halves(blocks)[:, :1] = parts.scales.view(np.uint16)


def _read_scale_and_minimum(blocks: Blocks) -> GroupParts:
    """The file adds its minimum, the scheme subtracts one."""
    halves = _halves(blocks)
    scales, minimums = halves[:, :1].copy(), halves[:, 1:2] ^ _SIGN
    return GroupParts(scales.view(np.float16), minimums.view(np.float16))


def _write_scale_and_minimum(parts: GroupParts, blocks: Blocks) -> None:
    assert parts.zeros is not None
    halves = _halves(blocks)
    halves[:, :1] = parts.scales.view(np.uint16)
    halves[:, 1:2] = np.ascontiguousarray(parts.zeros).view(np.uint16) ^ _SIGN


def _minimum(bits: int) -> Scheme:
    return Scheme(bits, BLOCK_SIZE, DType.float16, "minimum")


_Q8_0 = CodeLayout(BLOCK_SIZE, 34, (Plane(2, 8),), flip=0x80)
_Q4_0 = CodeLayout(BLOCK_SIZE, 18, (Plane(2, 4, 16),))
_Q4_1 = CodeLayout(BLOCK_SIZE, 20, (Plane(4, 4, 16),))
_Q5_0 = CodeLayout(BLOCK_SIZE, 22, (Plane(6, 4, 16), Plane(2, 1)))
_Q5_1 = CodeLayout(BLOCK_SIZE, 24, (Plane(8, 4, 16), Plane(4, 1)))

FORMATS = (
    quantized(8, "Q8_0", q8(BLOCK_SIZE), _Q8_0, _read_scale, _write_scale),
    quantized(2, "Q4_0", Scheme(4, BLOCK_SIZE), _Q4_0, _read_scale, _write_scale),
    quantized(3, "Q4_1", _minimum(4), _Q4_1, _read_scale_and_minimum, _write_scale_and_minimum),
    quantized(6, "Q5_0", Scheme(5, BLOCK_SIZE), _Q5_0, _read_scale, _write_scale),
    quantized(7, "Q5_1", _minimum(5), _Q5_1, _read_scale_and_minimum, _write_scale_and_minimum),
)
