"""Brings weights into the layout of the CPU kernels: see `cpu_kernel.py` and `cpu_codes_kernel.py`."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

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
_LINE = 64  # bytes of a cache line
_SCALES = {DType.float16: 0, DType.float32: 1, DType.int8: 2}
_CODINGS = {"middle": 0, "zeros": 1, "minimum": 2, "e4m3": 3}


def padded_columns(k: int) -> int:
    """Columns of a packed quantized matrix."""
    return (k + _CHUNK - 1) // _CHUNK * _CHUNK


def scheme_parameters(scheme: Scheme) -> dict[str, int]:
    """A scheme as template parameters; see `cpu_codes_kernel.py`."""
    pieces = _pieces(scheme)
    return {
        "BITS": scheme.bits,
        "GROUP": scheme.group_size,
        "SCALE": _SCALES[scheme.scale],
        "CODING": _CODINGS[scheme.coding],
        "PIECE": pieces.columns,
        "RECORDS": pieces.records,
        "STREAM": 2 * _CHUNK * scheme.bits + pieces.records * _CHUNK // pieces.columns,
    }


class _Pieces(NamedTuple):
    """What a block of 16 rows consists of."""

    columns: int
    """Of a piece."""
    records: int
    """Bytes before the codes of a piece: what belongs to its groups."""


def _pieces(scheme: Scheme) -> _Pieces:
    if not scheme.has_super_blocks:  # groups whose records fill cache lines, and whole chunks of codes
        record = 16 * scheme.scale.itemsize * (2 if scheme.has_zeros else 1)
        groups = max(_LINE // record, _CHUNK // scheme.group_size, 1)
        return _Pieces(groups * scheme.group_size, groups * record)
    groups = SUPER_BLOCK // scheme.group_size
    if not scheme.has_zeros:
        records = 16 * groups + 32
    elif scheme.bits == 2:
        records = 64 * -(-groups // 4) + 64
    else:
        records = 192 * -(-groups // 8) + 64
    return _Pieces(SUPER_BLOCK, records)


def packed_sizes(format: WeightFormat, n: int, k: int) -> PackedSizes:
    """Memory of an [N, K] matrix: N rounded up to a multiple of 16."""
    rows = (n + 15) // 16 * 16
    if isinstance(format, Scheme):
        return PackedSizes(_block_start(format, rows, k), 0, 0, rows)
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


def _block_start(scheme: Scheme, first: int, k: int) -> int:
    """Where row `first`, a multiple of 16, of k columns has its block, in bytes."""
    pieces, columns = _pieces(scheme), padded_columns(k)
    return first // 16 * (-(-columns // pieces.columns) * pieces.records + columns * scheme.bits * 2)


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
        *(Tensor.from_numpy(data), weight.data[_block_start(scheme, first, k) :]),
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
    """What belongs to groups, before the codes of each piece."""
    (n, k), kind = rows.shape, rows.scheme.scale.numpy
    scales = np.ascontiguousarray(rows.scales, kind)
    parts = [scales, scales if rows.zeros is None else np.ascontiguousarray(rows.zeros, kind)]
    if rows.super_scales is not None:
        supers = np.ascontiguousarray(rows.super_scales)
        parts += [supers, supers if rows.super_zeros is None else np.ascontiguousarray(rows.super_zeros)]
    launch(
        _pack_records(rows.scheme),
        *(Tensor.from_numpy(part.view(np.uint8)) for part in parts),
        *(weight.data[_block_start(rows.scheme, first, k) :], n, k),
        items=_blocks(n),
    )


@cache
def _pack_records(scheme: Scheme) -> Kernel:
    name = "pack_super_blocks" if scheme.has_super_blocks else "pack_records"
    return Kernel(_MODULE, name, **scheme_parameters(scheme))


# --- rounding ---------------------------------------------------------------------------------------------


def _round_rows(weight: LinearWeight, scheme: Scheme, first: int, rows: NDArray[Any]) -> None:
    n, k = rows.shape
    padded = padded_columns(k)
    scratch = Tensor.empty((num_threads(), padded), DType.int8)
    failed = Tensor.zeros((1,), DType.int32)
    launch(
        _quantize_pack(scheme, DType.of(rows.dtype)),
        Tensor.from_numpy(np.ascontiguousarray(rows).view(np.uint8)),
        weight.data[_block_start(scheme, first, k) :],
        *(scratch, failed, n, k),
        items=_blocks(n),
    )
    check_rounded(int(failed.item()))


@cache
def _quantize_pack(scheme: Scheme, source: DType) -> Kernel:
    return Kernel(_MODULE, "quantize_pack", **scheme_parameters(scheme), FORMAT=_FLOAT_FORMATS[source])
