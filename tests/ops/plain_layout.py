"""How CUDA kernels find quantized weights in memory, by the plain rule: bytes that packing must lead to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.quant import QuantTensor


def planes(codes: NDArray[np.uint8], bits: int, *, signed: bool) -> NDArray[np.uint8]:
    """Codes [N, K] of a byte each: bytes (`signed`: less 128), or planes of 4, 2 and 1 bits, low bits first.

    In a word of a plane of b bits, columns 2i and 2i + 1 lie at bits b i and 16 + b i.
    """
    if bits == 8:
        return (codes ^ 0x80 if signed else codes).reshape(-1)
    found, done = [], 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        part = (codes.reshape(-1) >> done & ((1 << width) - 1)).astype(np.uint32).reshape(-1, 16 // width, 2)
        at = np.arange(16 // width, dtype=np.uint32)[:, None] * width + np.array([0, 16], np.uint32)
        found.append((part << at).sum((1, 2), dtype=np.uint32).view(np.uint8))
        done += width
    return np.concatenate(found)


def parts(tensor: QuantTensor) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any] | None]:
    """Codes, records of groups, and records of super-blocks, each one after the other."""
    scheme = tensor.scheme
    signed = scheme.coding == "middle"

    def records(scales: NDArray[Any], zeros: NDArray[Any] | None) -> NDArray[Any]:
        if zeros is None:
            return scales.reshape(-1)
        return np.stack([scales, zeros.astype(scales.dtype)], -1).reshape(-1)

    of_super = None
    if tensor.super_scales is not None:
        of_super = records(tensor.super_scales, tensor.super_zeros)
    codes = planes(tensor.codes.unpack(), scheme.bits, signed=signed)
    return codes, records(tensor.scales, tensor.zeros), of_super
