"""Multiplying by a quantized matrix without ever making its weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuiperllm.quant import QuantTensor


def product_by_groups(tensor: QuantTensor, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """W x for codes with a middle, zero points or minimums.

    Of each group there are two sums, that of code times x and that of x alone:

    middle   s (c - h) gives s (sum of c x - h sum of x), with h = 2^(bits - 1)
    zeros    s (c - z) gives s (sum of c x - z sum of x)
    minimum  s c - m   gives s sum of c x - m sum of x

    Args:
        tensor: [N, K].
        x: float32 [K].

    Returns:
        float32 [N].
    """
    parts = x.reshape(-1, tensor.group_size)
    codes = tensor.codes.unpack().reshape(*tensor.scales.shape, tensor.group_size).astype(np.float32)
    products, sums = np.einsum("ngi,gi->ng", codes, parts), parts.sum(axis=1)
    scales, minimums = tensor.group_scales(), tensor.group_minimums()
    if minimums is not None:
        return (scales * products - minimums * sums).sum(axis=1)
    zeros = tensor.scheme.middle if tensor.zeros is None else tensor.zeros.astype(np.float32)
    return (scales * (products - zeros * sums)).sum(axis=1)
