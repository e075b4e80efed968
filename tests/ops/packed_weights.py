"""Quantized matrices laid out for CUDA by the plain rule of `ops/linear/codes.cuh`, a plane at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Device, Tensor
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.quant import QuantTensor


def packed(rows: QuantTensor, bias: NDArray[Any] | None, device: Device) -> LinearWeight:
    """The matrix on a CUDA device."""
    scheme, (n, k) = rows.scheme, rows.shape
    weight = LinearWeight.empty(
        scheme, n, k, columns=rows.columns, bias=bias is not None, device=device
    )  # fmt: skip
    _fill(weight.data, packed_codes(rows))
    _fill(weight.scales, _records(rows.scales, rows.zeros))
    if rows.super_scales is not None:
        _fill(weight.super_scales, _records(rows.super_scales, rows.super_zeros))
    if bias is not None:
        weight.write_bias(0, bias)
    return weight


def packed_codes(rows: QuantTensor) -> NDArray[np.uint8]:
    """All planes, one after the other."""
    codes, bits = rows.codes.unpack(), rows.scheme.bits
    if bits == 8:
        return (codes ^ np.uint8(0x80 if rows.scheme.coding == "middle" else 0)).reshape(-1)
    planes, done = [], 0
    for width in (4, 2, 1):
        if bits & width:
            planes.append(_plane(codes >> np.uint8(done) & np.uint8((1 << width) - 1), width))
            done += width
    return np.concatenate(planes)


def _plane(part: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    per_word = 32 // width
    columns = part.astype(np.uint32).reshape(-1, per_word)
    places = [np.uint32(i // 2 * width + i % 2 * 16) for i in range(per_word)]
    return np.bitwise_or.reduce(columns << np.array(places), axis=1).view(np.uint8)


def _records(scales: NDArray[Any], zeros: NDArray[Any] | None) -> NDArray[Any]:
    return scales if zeros is None else np.stack([scales, zeros.astype(scales.dtype)], axis=-1)


def _fill(tensor: Tensor | None, values: NDArray[Any]) -> None:
    assert tensor is not None
    whole = np.zeros(tensor.numel, tensor.dtype.numpy)
    whole[: values.size] = values.reshape(-1)
    tensor.copy_(Tensor.from_numpy(whole).to(tensor.device))
