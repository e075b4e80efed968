"""Matrix products for many rows of x: the weights are expanded to its type first, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.gemm_tiling import SWIGLU
from kuiperllm.ops.linear.planes import second_plane, template
from kuiperllm.ops.linear.weight import LinearWeight
from kuiperllm.quant import Scheme

_SOURCE = Path(__file__).with_name("expand.cu")
_BLOCK = 256
_COLUMNS_OF_A_THREAD = 8
_UNIT = 256  # rows of a piece: whole tiles

PIECE_BYTES = 128 << 20
"""Memory for the weights of a piece."""

Product = Callable[[Tensor, LinearWeight, Tensor, int], None]
"""Multiplies x by weights of its type that a kernel may just have written: (x, weight, out, epilogue)."""


def gemm_expanded(x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, product: Product) -> None:
    """The product by `product`; see `gemm.gemm`. x is float16 or bfloat16."""
    width, gated = out.shape[1], epilogue == SWIGLU
    of_row = x.shape[1] * 2 * (2 if gated else 1)
    rows = width if gated and weight.bias is not None else max(1, PIECE_BYTES // of_row // _UNIT) * _UNIT
    for first in range(0, width, rows):
        count = min(rows, width - first)
        piece = expanded(weight, x.dtype, first, count, first + width if gated else None)
        if weight.bias is not None:
            piece = replace(piece, bias=weight.bias[first:])
        product(x, piece, out[:, first : first + count], epilogue)


def expanded(
    weight: LinearWeight, dtype: DType, first: int, rows: int, second: int | None = None
) -> LinearWeight:
    """Some rows of a quantized matrix in a 16-bit type, each weight rounded once; without bias.

    Args:
        weight: the matrix.
        dtype: float16 or bfloat16.
        first: number of the first row.
        rows: how many.
        second: the first of as many others that follow behind these.
    """
    assert isinstance(weight.format, Scheme)
    k, count = weight.in_features, rows * (1 if second is None else 2)
    scratch = Tensor.empty((count * k * 2,), DType.uint8, weight.device)
    launch(
        _kernel(weight.format, dtype), -(-count * k // (_BLOCK * _COLUMNS_OF_A_THREAD)), _BLOCK,
        weight.data, second_plane(weight), weight.scales, weight.super_scales, weight.group_size, k,
        first, -1 if second is None else second, rows, scratch,
    )  # fmt: skip
    return LinearWeight(dtype, count, k, scratch)


@cache
def _kernel(scheme: Scheme, dtype: DType) -> Kernel:
    return Kernel(_SOURCE, "expand_rows", T=dtype, **template(scheme))
