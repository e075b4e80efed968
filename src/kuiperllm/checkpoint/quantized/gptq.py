"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them: 4 or 8 bits with zero points.

    qweight  int32 [K * bits / 32, N]: a word has neighbouring columns of one row, the first at the lowest
             bits
    qzeros   int32 [K / g, N * bits / 32]: the zero points of neighbouring rows; in the format `gptq` (v1)
             they are stored less 1, so that a zero point of 0 is all bits set
    scales   float16 [K / g, N]
    g_idx    int32 [K]: the group of each column. Columns were quantized in order of importance (act-order,
             `desc_act`) where this is not 0, ..., 0, 1, ..., 1 and so on.

A weight is scale (code - zero).
Source: the modules qlinear_cuda_old.py of AutoGPTQ and its `checkpoint_format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.quantized.base import (
    SCALE_TYPES,
    Arrays,
    Method,
    Module,
    QuantizedMatrix,
    column_order,
    refuse,
    spread_size,
    stored_scale_type,
)
from kuiperllm.checkpoint.quantized.fields import as_bits, group_size_of
from kuiperllm.quant import Codes, QuantTensor, Scheme
from kuiperllm.quant.codes import dense_layout
from kuiperllm.quant.packed_words import WORD_BITS, reordered, rows_of_gptq, unpack_words

_V1, _V2 = "gptq", "gptq_v2"
_SUPPORTED = "4 and 8 bits, in the formats gptq and gptq_v2"


class Gptq(Method):
    """AutoGPTQ's and GPTQModel's."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        bits, stored = as_bits(config.get("bits")), config.get("checkpoint_format") or _V1
        if bits is None:
            raise refuse(where, "GPTQ", f"{brief(config.get('bits'))} bits", _SUPPORTED)
        if stored not in (_V1, _V2) or config.get("is_marlin_format"):
            raise refuse(
                where, "GPTQ", f"the format {brief(stored if stored != _V1 else 'marlin')}", _SUPPORTED
            )
        self._bits: int = bits
        self._zeros_offset = np.uint8(1 if stored == _V1 else 0)
        self._group_size = group_size_of(config, where, "group_size")

    def matrix(self, module: Module) -> QuantizedMatrix | None:
        """Transposed when it is loaded."""
        if "qweight" not in module.tensors:
            return None
        per_word = WORD_BITS // self._bits
        height, rows = module.expect("qweight", ("int32",), 2)
        columns = height * per_word
        count, _ = module.expect("scales", SCALE_TYPES, 2)
        module.expect_shape("scales", SCALE_TYPES, (count, rows))
        module.expect_shape("qzeros", ("int32",), (count, -(-rows // per_word)))
        stored = module.groups(columns, count, self._group_size, "scales")
        size = stored if count > 1 else spread_size(columns)
        parts = ["qweight", "qzeros", "scales"]
        if "g_idx" in module.tensors:
            module.expect_shape("g_idx", ("int32", "int64"), (columns,))
            parts.append("g_idx")
        scale = stored_scale_type(module.tensors["scales"].dtype)
        scheme = Scheme(self._bits, size, scale, "zeros")

        def assemble(arrays: Arrays) -> QuantTensor:
            order = column_order(arrays.get("g_idx"), stored, count)
            data = rows_of_gptq(arrays["qweight"])
            if order is not None:
                data = reordered(data, self._bits, order)
            times = stored // size
            return QuantTensor(
                scheme,
                Codes(data, dense_layout(self._bits), columns),
                np.repeat(arrays["scales"].T.astype(scale.numpy), times, axis=1),
                np.repeat(self._zeros(arrays["qzeros"], rows), times, axis=1),
                columns=None if order is None else order.astype(np.int32),
            )

        return module.matrix(f"gptq-{scheme.name}", (rows, columns), scheme, parts, assemble)

    def _zeros(self, words: NDArray[np.int32], rows: int) -> NDArray[np.uint8]:
        """Zero points, [N, K / g]."""
        stored = unpack_words(words, self._bits)[:, :rows].T
        return (stored + self._zeros_offset) & np.uint8((1 << self._bits) - 1)
