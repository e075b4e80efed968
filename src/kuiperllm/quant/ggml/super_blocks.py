"""GGUF's K-quants, Q2_K to Q6_K: super-blocks of 256 weights in groups of 16 or 32.

The scale of a group is a float16 number of the super-block times a small whole number, which takes 4, 6 or
8 bits; so is the minimum of a group, in the types that have such.
Source: the block structs and the dequantizers of ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.dtype import DType
from kuiperllm.quant.codes import CodeLayout, Plane
from kuiperllm.quant.ggml.block import Blocks, GroupParts, quantized
from kuiperllm.quant.scheme import SUPER_BLOCK, Coding, Scheme

_LOW_4 = np.uint32(0x0F0F0F0F)
_LOW_6 = np.uint32(0x3F3F3F3F)
_LOW_2 = np.uint32(0x03030303)
_BITS_4_5 = np.uint32(0x30303030)
_BITS_6_7 = np.uint32(0xC0C0C0C0)
_2, _4 = np.uint32(2), np.uint32(4)
_MIDDLE_OF_6_BITS = np.uint8(32)


def _super(bits: int, group_size: int, coding: Coding) -> Scheme:
    return Scheme(bits, group_size, DType.int8, coding)


def _half(blocks: Blocks, offset: int) -> NDArray[np.float16]:
    """The float16 number at a place of each block, [n, 1]."""
    at = offset // 2
    return blocks.view(np.uint16)[:, at : at + 1].copy().view(np.float16)


def _put_half(blocks: Blocks, offset: int, numbers: NDArray[np.float16] | None) -> None:
    assert numbers is not None
    blocks.view(np.float16)[:, offset // 2] = numbers[:, 0]


def _words(blocks: Blocks, offset: int, count: int) -> NDArray[np.uint32]:
    """A copy of some 32-bit words of each block, [count, n]: a word after the other is worked on."""
    stored = np.ascontiguousarray(blocks[:, offset : offset + 4 * count])
    return np.ascontiguousarray(stored.view(np.uint32).T)


def _bytes(words: list[NDArray[np.uint32]]) -> NDArray[np.uint8]:
    """Words [n] each, side by side: uint8 [n, 4 * words]."""
    return np.stack(words, axis=1).view(np.uint8)


def _put(blocks: Blocks, offset: int, words: list[NDArray[np.uint32]]) -> None:
    blocks[:, offset : offset + 4 * len(words)] = _bytes(words)


# --- Q4_K and Q5_K: 8 scales and 8 minimums of 6 bits in 12 bytes, from byte 4 on -------------------------
#
# The low 6 bits of bytes 0-3 are scales 0-3, those of bytes 4-7 are minimums 0-3. Bytes 8-11 hold the low
# 4 bits of scales 4-7, and above them those of minimums 4-7; the 2 bits that these lack are on top of
# bytes 0-3 and 4-7.


def _read_6_bit_pairs(blocks: Blocks) -> GroupParts:
    scales, minimums, rest = _words(blocks, 4, 3)
    of_scales = _bytes([scales & _LOW_6, (rest & _LOW_4) | (scales >> _2 & _BITS_4_5)])
    of_minimums = _bytes([minimums & _LOW_6, (rest >> _4 & _LOW_4) | (minimums >> _2 & _BITS_4_5)])
    return GroupParts(of_scales.view(np.int8), of_minimums.view(np.int8), _half(blocks, 0), _half(blocks, 2))


def _write_6_bit_pairs(parts: GroupParts, blocks: Blocks) -> None:
    assert parts.zeros is not None
    scales, more_scales = _words(parts.scales.view(np.uint8), 0, 2)
    minimums, more_minimums = _words(parts.zeros.view(np.uint8), 0, 2)
    words = [
        (scales & _LOW_6) | (more_scales << _2 & _BITS_6_7),
        (minimums & _LOW_6) | (more_minimums << _2 & _BITS_6_7),
        (more_scales & _LOW_4) | (more_minimums & _LOW_4) << _4,
    ]
    _put(blocks, 4, words)
    _put_half(blocks, 0, parts.super_scales)
    _put_half(blocks, 2, parts.super_zeros)


# --- Q2_K: 16 bytes, a scale in the low and a minimum in the high 4 bits ----------------------------------


def _read_4_bit_pairs(blocks: Blocks) -> GroupParts:
    pairs = np.ascontiguousarray(blocks[:, :16])
    scales, minimums = pairs & np.uint8(15), pairs >> np.uint8(4)
    return GroupParts(scales.view(np.int8), minimums.view(np.int8), _half(blocks, 80), _half(blocks, 82))


def _write_4_bit_pairs(parts: GroupParts, blocks: Blocks) -> None:
    assert parts.zeros is not None
    blocks[:, :16] = parts.scales.view(np.uint8) | parts.zeros.view(np.uint8) << np.uint8(4)
    _put_half(blocks, 80, parts.super_scales)
    _put_half(blocks, 82, parts.super_zeros)


# --- Q3_K: 16 scales of 6 bits, stored plus 32, in 12 bytes from byte 96 on -------------------------------
#
# Bytes 0-7 hold the low 4 bits of scales 0-7, and above them those of scales 8-15. Two more bits of scale i
# are in byte 8 + i % 4, at bit 2 (i / 4).


def _read_6_bit_scales(blocks: Blocks) -> GroupParts:
    first, second, high = _words(blocks, 96, 3)
    words = [
        (low >> _4 * np.uint32(i // 2) & _LOW_4) | (high >> _2 * np.uint32(i) & _LOW_2) << _4
        for i, low in enumerate((first, second, first, second))
    ]
    scales = _bytes(words) - _MIDDLE_OF_6_BITS
    return GroupParts(scales.view(np.int8), None, _half(blocks, 108))


def _write_6_bit_scales(parts: GroupParts, blocks: Blocks) -> None:
    first, second, third, fourth = _words(parts.scales.view(np.uint8) + _MIDDLE_OF_6_BITS, 0, 4)
    high = sum(
        (scales >> _4 & _LOW_2) << _2 * np.uint32(i)
        for i, scales in enumerate((first, second, third, fourth))
    )
    words = [(first & _LOW_4) | (third & _LOW_4) << _4, (second & _LOW_4) | (fourth & _LOW_4) << _4, high]
    _put(blocks, 96, words)
    _put_half(blocks, 108, parts.super_scales)


# --- Q6_K: 16 scales of 8 bits from byte 192 on -----------------------------------------------------------


def _read_8_bit_scales(blocks: Blocks) -> GroupParts:
    scales = np.ascontiguousarray(blocks[:, 192:208])
    return GroupParts(scales.view(np.int8), None, _half(blocks, 208))


def _write_8_bit_scales(parts: GroupParts, blocks: Blocks) -> None:
    blocks[:, 192:208] = parts.scales.view(np.uint8)
    _put_half(blocks, 208, parts.super_scales)


_Q2_K = CodeLayout(SUPER_BLOCK, 84, (Plane(16, 2, 32),))
_Q3_K = CodeLayout(SUPER_BLOCK, 110, (Plane(32, 2, 32), Plane(0, 1, 32)))
_Q4_K = CodeLayout(SUPER_BLOCK, 144, (Plane(16, 4, 32),))
_Q5_K = CodeLayout(SUPER_BLOCK, 176, (Plane(48, 4, 32), Plane(16, 1, 32)))
_Q6_K = CodeLayout(SUPER_BLOCK, 210, (Plane(0, 4, 64), Plane(128, 2, 32)))

FORMATS = (
    quantized(10, "Q2_K", _super(2, 16, "minimum"), _Q2_K, _read_4_bit_pairs, _write_4_bit_pairs),
    quantized(11, "Q3_K", _super(3, 16, "middle"), _Q3_K, _read_6_bit_scales, _write_6_bit_scales),
    quantized(12, "Q4_K", _super(4, 32, "minimum"), _Q4_K, _read_6_bit_pairs, _write_6_bit_pairs),
    quantized(13, "Q5_K", _super(5, 32, "minimum"), _Q5_K, _read_6_bit_pairs, _write_6_bit_pairs),
    quantized(14, "Q6_K", _super(6, 16, "middle"), _Q6_K, _read_8_bit_scales, _write_8_bit_scales),
)
