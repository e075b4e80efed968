"""Matrices of 8-bit numbers [N, K] with scales for the tensor, for rows, for groups of columns or blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.quantized.base import (
    SCALE_TYPES,
    Arrays,
    Module,
    QuantizedMatrix,
    column_order,
    spread_size,
)
from kuiperllm.core.dtype import DType
from kuiperllm.quant import Codes, Coding, QuantTensor, Scheme
from kuiperllm.quant.codes import BYTES, INT8
from kuiperllm.quant.packed_words import reordered

Block = tuple[int, int]
"""Rows and columns that share a scale."""


def matrix_of(
    module: Module,
    scales: str,
    dtype: str,
    *,
    block: Block | None = None,
    zeros: str | None = None,
    order: str | None = None,
) -> QuantizedMatrix:
    """The matrix `weight`, e4m3 or int8, times its scales; they are repeated for groups that kernels take.

    Args:
        module: has `weight` and the scales: one, [N], [N, 1], [N, K / g], or with `block` one for a block.
        scales: what their name ends in.
        dtype: for people.
        block: what shares a scale.
        zeros: what the name of the zero points ends in: int8, as many as scales.
        order: what the name of the group of each column ends in.
    """
    rows, columns = module.expect("weight", ("float8_e4m3fn", "int8"), 2)
    is_e4m3 = module.tensors["weight"].dtype == "float8_e4m3fn"
    found = module.tensors.get(scales)
    shape = () if found is None else found.shape
    if block is not None:
        shape = (-(-rows // block[0]), -(-columns // block[1]))
        width = block[1]
    elif math.prod(shape) == 1:
        width = columns
    elif shape[0] == rows and len(shape) <= 2:
        width = module.groups(columns, shape[1] if len(shape) == 2 else 1, None, scales)
    else:
        shape, width = (rows, 1), columns  # what it should be
    module.expect_shape(scales, SCALE_TYPES, shape)
    if zeros is not None:
        module.expect_shape(zeros, ("int8",), shape)
    if order is not None:
        module.expect_shape(order, ("int32", "int64"), (columns,))
    size = spread_size(columns, width) if block is not None or width == columns else width
    coding: Coding = "e4m3" if is_e4m3 else "middle" if zeros is None else "zeros"
    scheme = Scheme(8, size, DType.float32, coding)

    def assemble(arrays: Arrays) -> QuantTensor:
        stored = arrays["weight"].view(np.uint8)
        columns_in = None if order is None else column_order(arrays[order], width, columns // width)
        if columns_in is not None:
            stored = reordered(stored, 8, columns_in)

        def of_groups(numbers: NDArray[Any]) -> NDArray[Any]:
            return _spread(numbers, rows, columns // size, block, size)

        of_zero = None if zeros is None else of_groups(arrays[zeros].view(np.uint8) ^ np.uint8(0x80))
        return QuantTensor(
            scheme,
            Codes(stored, BYTES if is_e4m3 else INT8, columns),
            of_groups(arrays[scales].astype(np.float32)),
            of_zero,
            columns=None if columns_in is None else columns_in.astype(np.int32),
        )

    parts = [part for part in ("weight", scales, zeros, order) if part is not None]
    return module.matrix(dtype, (rows, columns), scheme, parts, assemble)


def _spread(numbers: NDArray[Any], rows: int, groups: int, block: Block | None, size: int) -> NDArray[Any]:
    """Numbers of any shape that `matrix_of` takes, for each group: [N, groups]."""
    if block is not None:
        # The last block of a row or column may be cut off.
        columns = np.repeat(numbers, min(block[1] // size, groups), axis=1)[:, :groups]
        return np.repeat(columns, min(block[0], rows), axis=0)[:rows]
    if numbers.size == 1:
        return np.full((rows, groups), numbers.reshape(-1)[0])
    numbers = numbers.reshape(rows, -1)
    return np.repeat(numbers, groups // numbers.shape[1], axis=1)
