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
from kuiperllm.quant import SUPER_BLOCK, CodeLayout, Codes, QuantTensor, Scheme
from kuiperllm.quant.codes import BYTES, INT8, dense_layout

_SOURCE = Path(__file__).with_name("cuda_weights.cu")
_PACK_SOURCE = Path(__file__).with_name("pack_codes.cu")
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


def row_bytes(dtype: DType, k: int) -> int:
    """Bytes from one row of floating-point values to the next: columns, and zeros up to a whole vector."""
    return -(-k * dtype.itemsize // VECTOR_BYTES) * VECTOR_BYTES


def packed_sizes(format: WeightFormat, n: int, k: int) -> PackedSizes:
    """Memory of an [N, K] matrix. Scales fill whole vectors, because kernels load such."""
    bias = -(-n // 16) * 16
    if isinstance(format, DType):
        return PackedSizes(n * row_bytes(format, k), 0, 0, bias)
    each = 2 if format.has_zeros else 1
    super_scales = n * (k // SUPER_BLOCK) * each if format.has_super_blocks else 0
    return PackedSizes(
        n * k * format.bits // 8,
        _whole_vectors(n * (k // format.group_size) * each, format.scale),
        _whole_vectors(super_scales, DType.float16),
        bias,
    )


def _whole_vectors(count: int, dtype: DType) -> int:
    step = VECTOR_BYTES // dtype.itemsize
    return -(-count // step) * step


def write_rows(weight: LinearWeight, first: int, rows: Rows) -> None:
    """Lay out rows `first` and on; see `LinearWeight.write_rows`."""
    if isinstance(rows, QuantTensor):
        _write_codes(weight, first, rows.codes)
        assert weight.scales is not None
        _write_records(weight.scales, first, rows.scales, rows.zeros)
        if weight.super_scales is not None:
            assert rows.super_scales is not None
            _write_records(weight.super_scales, first, rows.super_scales, rows.super_zeros)
        weight.device.synchronize()  # kernels take weights for constants, and read them before their turn
    elif weight.scheme is not None:
        _round_rows(weight, first, rows)
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
    weight.device.synchronize()


# --- quantized --------------------------------------------------------------------------------------------


def _write_codes(weight: LinearWeight, first: int, codes: Codes) -> None:
    """Bytes that the file holds as kernels want them are copied; what else there is a kernel lays out."""
    scheme = weight.scheme
    assert scheme is not None
    if scheme.bits == 8 and codes.layout == (INT8 if scheme.coding == "middle" else BYTES):
        _copy_rows(weight.data, first, codes.data)
        return
    for start, piece in _pieces(codes.data):
        source = Tensor.from_numpy(piece).to(weight.device)
        _pack_piece(weight, first + start, source, codes.layout)


def _pack_piece(weight: LinearWeight, first: int, source: Tensor, layout: CodeLayout) -> None:
    """Rows of codes on the device, [n, row bytes], to rows of planes."""
    assert weight.scheme is not None
    (rows, in_row), k = source.shape, weight.in_features
    launch(
        _packer(weight.scheme, layout), _blocks(rows * k // 32), _BLOCK,
        source, weight.data, rows, k, in_row, first, weight.out_features,
    )  # fmt: skip


def _write_records(to: Tensor, first: int, scales: NDArray[Any], zeros: NDArray[Any] | None) -> None:
    """What groups (or super-blocks) have beside their codes: scales, or pairs of a scale and a zero."""
    if zeros is None:
        _copy_rows(to, first, scales)
        return
    for start, piece in _pieces(scales):
        beside = np.ascontiguousarray(zeros[start : start + len(piece)])
        launch(
            _pairs(DType.of(piece.dtype), DType.of(beside.dtype)), _blocks(piece.size), _BLOCK,
            *(Tensor.from_numpy(part).to(to.device) for part in (piece, beside)),
            to[2 * (first + start) * piece.shape[1] :], piece.size,
        )  # fmt: skip


def _round_rows(weight: LinearWeight, first: int, rows: NDArray[Any]) -> None:
    scheme = weight.scheme
    assert scheme is not None
    assert weight.scales is not None
    k, group = weight.in_features, scheme.group_size
    failed = Tensor.zeros((1,), DType.int32, weight.device)
    for start, piece in _pieces(rows):
        at, groups = first + start, piece.size // group
        codes = weight.data[at * k :]
        if scheme.bits < 8:
            codes = Tensor.empty(piece.shape, DType.uint8, weight.device)
        launch(
            _rounder(DType.of(rows.dtype), scheme.bits),
            min(-(-groups // _GROUPS_OF_A_BLOCK), _MAX_BLOCKS), _BLOCK,
            Tensor.from_numpy(piece).to(weight.device),
            codes, weight.scales[at * (k // group) :], failed, groups, group,
        )  # fmt: skip
        if scheme.bits < 8:
            _pack_piece(weight, at, codes, BYTES)
    check_rounded(int(failed.item()))  # reading it waits for the kernels, as `write_rows` does elsewhere


def _pieces(rows: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Rows one after the other in memory, a piece at a time, and the number of the first."""
    step = max(1, _PIECE_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        yield start, np.ascontiguousarray(rows[start : start + step])


def _blocks(items: int) -> int:
    return max(1, min(-(-items // _BLOCK), _MAX_BLOCKS))


@cache
def _converter(stored: DType, to: DType) -> Kernel:
    return Kernel(_SOURCE, "convert_rows", S=stored, T=to)


@cache
def _rounder(stored: DType, bits: int) -> Kernel:
    return Kernel(_SOURCE, "round_groups", S=stored, BITS=bits)


@cache
def _packer(scheme: Scheme, layout: CodeLayout) -> Kernel:
    planes = ", ".join(f"{{{plane.offset}, {plane.bits}, {plane.run}}}" for plane in layout.planes)
    return Kernel(
        _PACK_SOURCE, "pack_codes",
        BLOCK=layout.block_size, BLOCK_BYTES=layout.block_bytes, PLANES=f"{{{planes}}}", FLIP=layout.flip,
        BITS=scheme.bits, SIGNED=scheme.bits == 8 and scheme.coding == "middle",
    )  # fmt: skip


@cache
def _pairs(scales: DType, zeros: DType) -> Kernel:
    return Kernel(_SOURCE, "pair_records", S=scales, Z=zeros)


def kernels(chip: Chip) -> list[Kernel]:
    """The kernels of this module, for tests that compile them; some layouts stand for all."""
    converters = [_converter(stored, to) for stored in ACTIVATIONS for to in ACTIVATIONS]
    rounders = [_rounder(stored, bits) for stored in ACTIVATIONS for bits in (8, 4)]
    packers = [_packer(Scheme(bits, 32), dense_layout(bits)) for bits in (2, 3, 4, 5, 6)]
    pairs = [_pairs(DType.float16, DType.uint8), _pairs(DType.int8, DType.int8)]
    return [*converters, *rounders, *packers, *pairs]
