"""Lays out the weights of linear layers for CUDA: plain rows, which copies bring as they are.

What has to be converted or rounded is brought as the checkpoint holds it, and a kernel does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.backends.cuda.driver import Chip
from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.backends.cuda.rows import VECTOR_BYTES, grid
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.contract import ACTIVATIONS
from kuiperllm.ops.linear.weight import LinearWeight, PackedSizes, Rounding, Rows, WeightFormat, check_rounded
from kuiperllm.quant import SUPER_BLOCK, QuantTensor, Scheme

_SOURCE = Path(__file__).with_name("cuda_weights.cu")
_BLOCK = 256
_GROUPS_OF_A_BLOCK = 8
_MAX_BLOCKS = 1 << 16
_PIECE_BYTES = 32 << 20  # of rows that are copied on the host, or held by the device to be converted


def activation_dtype(format: WeightFormat) -> DType:
    """The type of activations for weights of a format: their own, for quantized ones bfloat16."""
    return DType.bfloat16 if isinstance(format, Scheme) else format


def rounding(format: WeightFormat, tokens: int, k: int) -> Rounding:
    """What x is rounded to before it is multiplied: nothing, whatever the weights are."""
    return None


def row_bytes(format: WeightFormat, k: int) -> int:
    """Bytes from one row of packed values to the next: the columns, and zeros up to a whole vector.

    Rows of codes are not padded.
    """
    if isinstance(format, Scheme):
        return k * format.bits // 8
    return -(-k * format.itemsize // VECTOR_BYTES) * VECTOR_BYTES


def packed_sizes(format: WeightFormat, n: int, k: int) -> PackedSizes:
    """Memory of an [N, K] matrix. The scales fill whole words, because kernels load such."""
    scales = super_scales = 0
    if isinstance(format, Scheme):
        each, word = (2 if format.has_zeros else 1), 4 // format.scale.itemsize
        scales = -(-n * (k // format.group_size) * each // word) * word
        super_scales = n * (k // SUPER_BLOCK) * each if format.has_super_blocks else 0
    return PackedSizes(n * row_bytes(format, k), scales, -(-super_scales // 2) * 2, -(-n // 16) * 16)


def write_rows(weight: LinearWeight, first: int, rows: Rows) -> None:
    """Lay out rows `first` and on; see `LinearWeight.write_rows`."""
    if isinstance(rows, QuantTensor):
        assert weight.scales is not None
        _copy_rows(weight.data, first, rows.codes.unpack() ^ np.uint8(0x80))
        _copy_rows(weight.scales, first, rows.scales.astype(weight.scales.dtype.numpy, copy=False))
    elif isinstance(weight.format, Scheme):
        _quantize_rows(weight, first, rows)
    elif DType.of(rows.dtype) is weight.format and rows[:1].nbytes == row_bytes(weight.format, rows.shape[1]):
        _copy_rows(weight.data, first, rows)
    else:
        _convert_rows(weight, first, rows)


def _copy_rows(packed: Tensor, first: int, rows: NDArray[Any]) -> None:
    # What is contiguous goes as a whole: the back end cuts it up itself, and overlaps the pieces.
    for start, piece in [(0, rows)] if rows.flags.c_contiguous else _pieces(rows):
        source = piece.reshape(-1).view(packed.dtype.numpy)
        at = (first + start) * (source.size // len(piece))
        packed[at : at + source.size].copy_(Tensor.from_numpy(source))


def _convert_rows(weight: LinearWeight, first: int, rows: NDArray[Any]) -> None:
    assert isinstance(weight.format, DType)
    to, stride_bytes = weight.format, row_bytes(weight.format, weight.in_features)
    stride = stride_bytes // to.itemsize
    for start, piece in _pieces(rows):
        launch(
            _converter(DType.of(rows.dtype), to), grid(stride, len(piece), _BLOCK), _BLOCK,
            Tensor.from_numpy(piece).to(weight.device), weight.data[(first + start) * stride_bytes :],
            *piece.shape, stride,
        )  # fmt: skip
    weight.device.synchronize()  # kernels take weights for constants, and read them before their turn


def _quantize_rows(weight: LinearWeight, first: int, rows: NDArray[Any]) -> None:
    assert weight.scales is not None
    k, group = weight.in_features, weight.group_size
    failed = Tensor.zeros((1,), DType.int32, weight.device)
    for start, piece in _pieces(rows):
        at, groups = first + start, piece.size // group
        launch(
            _quantizer(DType.of(rows.dtype)), min(-(-groups // _GROUPS_OF_A_BLOCK), _MAX_BLOCKS), _BLOCK,
            Tensor.from_numpy(piece).to(weight.device),
            weight.data[at * k :], weight.scales[at * (k // group) :], failed, groups, group,
        )  # fmt: skip
    check_rounded(int(failed.item()))  # reading it waits for the kernels, as `_convert_rows` does


def _pieces(rows: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Rows one after the other in memory, a piece at a time, and the number of the first."""
    step = max(1, _PIECE_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        yield start, np.ascontiguousarray(rows[start : start + step])


@cache
def _converter(stored: DType, to: DType) -> Kernel:
    return Kernel(_SOURCE, "convert_rows", S=stored, T=to)


@cache
def _quantizer(stored: DType) -> Kernel:
    return Kernel(_SOURCE, "quantize_groups", S=stored)


def kernels(chip: Chip) -> list[Kernel]:
    """The kernels of this module, for tests that compile them."""
    converters = [_converter(stored, to) for stored in ACTIVATIONS for to in ACTIVATIONS]
    return [*converters, *(_quantizer(stored) for stored in ACTIVATIONS)]
