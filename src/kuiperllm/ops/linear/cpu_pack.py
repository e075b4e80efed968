"""Brings weights into the layout of the CPU kernels: see `cpu_kernel.py` and `cpu_codes_kernel.py`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.weight import LinearWeight, PackedSizes, Rows, WeightFormat, check_rounded
from kuiperllm.quant import SUPER_BLOCK, CodeLayout, Codes, Plane, QuantTensor, Scheme

_MODULE = "kuiperllm.ops.linear.cpu_pack_kernel"
_FLOAT_FORMATS = {DType.float32: 0, DType.float16: 1, DType.bfloat16: 2}
_PIECE_BYTES = 8 << 20  # of rows, in float32, that are converted at a time
_CHUNK = 32  # columns that codes are packed by
_SCALES = {DType.float16: 0, DType.float32: 1, DType.int8: 2}
_CODINGS = {"middle": 0, "zeros": 1, "minimum": 2, "e4m3": 3}


def padded_columns(k: int) -> int:
    """Columns of a packed quantized matrix."""
    return (k + _CHUNK - 1) // _CHUNK * _CHUNK


def scheme_parameters(scheme: Scheme) -> dict[str, int]:
    """A scheme as template parameters; see `cpu_codes_kernel.py`."""
    return {
        "BITS": scheme.bits,
        "GROUP": scheme.group_size,
        "SCALE": _SCALES[scheme.scale],
        "CODING": _CODINGS[scheme.coding],
        "STREAM": _stream_bytes(scheme),
    }


def _stream_bytes(scheme: Scheme) -> int:
    """Bytes of a block for every 32 columns: codes and, with super-blocks, what belongs to groups."""
    codes = 16 * _CHUNK * scheme.bits // 8
    if not scheme.has_super_blocks:
        return codes
    groups = SUPER_BLOCK // scheme.group_size
    if not scheme.has_zeros:
        records = 16 * groups + 32
    elif scheme.bits == 2:
        records = 64 * -(-groups // 4) + 64
    else:
        records = 192 * -(-groups // 8) + 64
    return codes + records * _CHUNK // SUPER_BLOCK


def packed_sizes(format: WeightFormat, n: int, k: int) -> PackedSizes:
    """Memory of an [N, K] matrix: N rounded up to a multiple of 16."""
    rows = (n + 15) // 16 * 16
    if isinstance(format, Scheme):
        k, each = padded_columns(k), 2 if format.has_zeros else 1
        scales = 0 if format.has_super_blocks else rows * (k // format.group_size) * each
        return PackedSizes(_stream_start(format, rows, k), scales, 0, rows)
    row_bytes = (k + 1) // 2 * 4 if format is DType.bfloat16 else k * format.itemsize
    return PackedSizes(rows * row_bytes, 0, 0, rows)


def write_rows(weight: LinearWeight, first: int, rows: Rows) -> None:
    """Lay out rows `first` and on; see `LinearWeight.write_rows`."""
    if isinstance(rows, QuantTensor):
        _write_codes(weight, first, rows.codes)
        _write_groups(weight, first, rows)
        return
    n, k = rows.shape
    step = max(16, _PIECE_BYTES // (4 * k) // 16 * 16)
    for start in range(0, n, step):  # piece by piece, because a piece may have to be copied or converted
        part = rows[start : start + step]
        if isinstance(weight.format, Scheme):
            _round_rows(weight, weight.format, first + start, part)
        else:
            _write_floats(weight, first + start, part.astype(weight.format.numpy, copy=False))


def _blocks(rows: int) -> int:
    return (rows + 15) // 16


def _stream_start(scheme: Scheme, first: int, k: int) -> int:
    """Where row `first`, a multiple of 16, has its block, in bytes."""
    return first // 16 * (padded_columns(k) // _CHUNK) * _stream_bytes(scheme)


# --- floating point ---------------------------------------------------------------------------------------


def _write_floats(weight: LinearWeight, first: int, values: NDArray[Any]) -> None:
    n, k = values.shape
    if weight.format is DType.bfloat16 and k % 2:
        values = np.pad(values.view(np.uint16), ((0, 0), (0, 1)))
    source = Tensor.from_numpy(np.ascontiguousarray(values).view(np.uint8))
    row_bytes = source.shape[1]
    packed = weight.data[first * row_bytes :]
    if weight.format is DType.float16:
        launch(_PACK_HALVES, source, packed, n, k, items=_blocks(n))
    else:
        launch(_PACK_WORDS, source, packed, n, row_bytes // 4, items=_blocks(n))


_PACK_WORDS = Kernel(_MODULE, "pack_words")
_PACK_HALVES = Kernel(_MODULE, "pack_halves")


# --- codes ------------------------------------------------------------------------------------------------


def _write_codes(weight: LinearWeight, first: int, codes: Codes) -> None:
    scheme = weight.scheme
    assert scheme is not None
    n, k = codes.data.shape[0], codes.columns
    layout = _in_eights(codes.layout)
    if layout is None:
        codes = Codes.of_bytes(codes.unpack())
        layout = _in_eights(codes.layout)
        assert layout is not None
    data = codes.data if codes.data.strides[1] == 1 else np.ascontiguousarray(codes.data)
    launch(
        _pack_codes(scheme, layout),
        *(Tensor.from_numpy(data), weight.data[_stream_start(scheme, first, k) :]),
        *(n, k, data.strides[0]),
        items=_blocks(n),
    )


def _in_eights(layout: CodeLayout) -> CodeLayout | None:
    """The layout in blocks that eights of columns divide; None if eight neighbours lie too far apart."""
    planes = layout.planes
    if layout.block_size % 8:  # one plane without gaps: any number of columns is a block
        (plane,) = planes
        if plane.run != 1 or plane.offset or layout.block_bytes != plane.bytes_of(layout.block_size):
            return None
        return CodeLayout(_CHUNK, plane.bytes_of(_CHUNK), planes, layout.flip)
    return layout if all(plane.run == 1 or plane.run % 8 == 0 for plane in planes) else None


@cache
def _pack_codes(scheme: Scheme, layout: CodeLayout) -> Kernel:
    planes = layout.planes + (Plane(0, 0),) * (3 - len(layout.planes))
    parameters = {
        f"{name}_{index}": value
        for index, plane in enumerate(planes)
        for name, value in (("OFFSET", plane.offset), ("BITS", plane.bits), ("RUN", plane.run))
    }
    flip = int.from_bytes(bytes([layout.flip] * 8), "little", signed=True)
    return Kernel(
        _MODULE,
        "pack_codes",
        **scheme_parameters(scheme),
        BLOCK=layout.block_size,
        BLOCK_BYTES=layout.block_bytes,
        PLANES=len(layout.planes),
        FLIP=flip,
        **parameters,
    )


# --- what belongs to groups -------------------------------------------------------------------------------


def _write_groups(weight: LinearWeight, first: int, rows: QuantTensor) -> None:
    if rows.scheme.has_super_blocks:
        _write_super_blocks(weight, first, rows)
        return
    groups = padded_columns(weight.in_features) // weight.group_size
    _write_records(weight.scales, first, groups, rows.scales, rows.zeros, rows.scheme.scale.numpy)


def _write_super_blocks(weight: LinearWeight, first: int, rows: QuantTensor) -> None:
    """What belongs to groups, behind the codes of each super-block."""
    n, k = rows.shape
    parts = rows.scales, rows.zeros, rows.super_scales, rows.super_zeros
    stored = [np.ascontiguousarray(rows.scales if part is None else part).view(np.uint8) for part in parts]
    launch(
        _pack_super_blocks(rows.scheme),
        *(Tensor.from_numpy(part) for part in stored),
        *(weight.data[_stream_start(rows.scheme, first, k) :], n, k),
        items=_blocks(n),
    )


@cache
def _pack_super_blocks(scheme: Scheme) -> Kernel:
    return Kernel(_MODULE, "pack_super_blocks", **scheme_parameters(scheme))


def _write_records(
    packed: Tensor | None,
    first: int,
    groups: int,
    scales: NDArray[Any] | None,
    zeros: NDArray[Any] | None,
    kind: np.dtype[Any],
) -> None:
    """Scales, and what each has beside it, of rows `first` and on; `groups` of them for each row."""
    assert packed is not None
    record = 16 if zeros is None else 32
    to = packed[first * groups * (record // 16) :]
    for place, part in enumerate((scales, zeros)):
        if part is not None:
            stored = np.ascontiguousarray(part, kind)
            launch(
                _pack_groups(kind.itemsize),
                *(Tensor.from_numpy(stored.view(np.uint8)), to[place * 16 :], *stored.shape, groups, record),
                items=_blocks(len(stored)),
            )


@cache
def _pack_groups(width: int) -> Kernel:
    return Kernel(_MODULE, "pack_groups", WIDTH=width)


# --- rounding ---------------------------------------------------------------------------------------------


def _round_rows(weight: LinearWeight, scheme: Scheme, first: int, rows: NDArray[Any]) -> None:
    assert weight.scales is not None
    n, k = rows.shape
    padded = padded_columns(k)
    scratch = Tensor.empty((num_threads(), padded), DType.int8)
    failed = Tensor.zeros((1,), DType.int32)
    launch(
        _quantize_pack(scheme, DType.of(rows.dtype)),
        Tensor.from_numpy(np.ascontiguousarray(rows).view(np.uint8)),
        weight.data[_stream_start(scheme, first, k) :],
        weight.scales[first * (padded // scheme.group_size) :],
        *(scratch, failed, n, k),
        items=_blocks(n),
    )
    check_rounded(int(failed.item()))


@cache
def _quantize_pack(scheme: Scheme, source: DType) -> Kernel:
    return Kernel(_MODULE, "quantize_pack", **scheme_parameters(scheme), FORMAT=_FLOAT_FORMATS[source])
