"""Launches the CUDA kernels of `embedding`."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

from kuiperllm.backends.cuda.driver import Chip
from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.backends.cuda.rows import grid, vector_width
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.contract import ACTIVATIONS
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.ops.linear.cuda_weights import row_bytes
from kuiperllm.ops.linear.planes import template
from kuiperllm.quant import Scheme

DTYPES = ACTIVATIONS

_SOURCE = Path(__file__).with_name("cuda.cu")
_CODES_SOURCE = Path(__file__).with_name("cuda_codes.cu")
_BLOCK = 128
_WIDTH = 8


def embedding(ids: Tensor, table: LinearWeight, out: Tensor) -> None:
    """Unpack one row for each id; threads write eight elements, or one where rows are not made of eights."""
    (tokens,), width = ids.shape, table.in_features
    vectors = vector_width(width, DType.bfloat16, out) == _WIDTH and table.columns is None
    step = _WIDTH if vectors else 1
    blocks = grid(-(-width // step), tokens, _BLOCK)
    if isinstance(table.format, Scheme):
        launch(
            _codes(table.format, out.dtype, step), blocks, _BLOCK,
            ids, table.data, table.scales, table.super_scales, table.columns, out,
            tokens, table.out_features, width, out.strides[0],
        )  # fmt: skip
    else:
        stored = table.format
        stride = row_bytes(stored, width) // stored.itemsize
        launch(
            _float(stored, out.dtype, step), blocks, _BLOCK,
            ids, table.data, out, tokens, table.out_features, width, stride, out.strides[0],
        )  # fmt: skip


@cache
def _float(stored: DType, dtype: DType, step: int) -> Kernel:
    return Kernel(_SOURCE, "embedding_float", S=stored, T=dtype, WIDTH=step)


@cache
def _codes(scheme: Scheme, dtype: DType, step: int) -> Kernel:
    return Kernel(
        _CODES_SOURCE, "embedding_codes", GROUP=scheme.group_size, T=dtype, WIDTH=step, **template(scheme)
    )


def kernels(chip: Chip) -> list[Kernel]:
    """The kernels of this module, for tests that compile them; some schemes stand for all."""
    made = []
    schemes = Scheme(8, 64), Scheme(4, 32, DType.int8, "minimum"), Scheme(6, 16, DType.int8)
    for dtype, step in product(DTYPES, (_WIDTH, 1)):
        made += [_float(stored, dtype, step) for stored in DTYPES]
        made += [_codes(scheme, dtype, step) for scheme in schemes]
    return made
