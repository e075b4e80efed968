"""AWQ checkpoints as AutoAWQ writes them, version `gemm`: 4 bits with zero points.

    qweight  int32 [K, N / 8]: a word has the codes of eight rows, of which rows 0, 2, 4, 6, 1, 3, 5, 7 lie at
             bits 0, 4, 8 and so on
    qzeros   int32 [K / g, N / 8]: zero points, in the same order
    scales   float16 [K / g, N]

A weight is scale (code - zero).
Source: AutoAWQ's awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.quantized.base import (
    SCALE_TYPES,
    Arrays,
    Method,
    Module,
    QuantizedMatrix,
    refuse,
    spread_size,
    stored_scale_type,
)
from kuiperllm.checkpoint.quantized.fields import group_size_of
from kuiperllm.quant import Codes, QuantTensor, Scheme
from kuiperllm.quant.codes import NIBBLES
from kuiperllm.quant.packed_words import AWQ_ORDER, rows_of_awq, unpack_words

_SUPPORTED = "4 bits, version gemm"


class Awq(Method):
    """AutoAWQ's."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        bits = config.get("bits", config.get("w_bit", 4))
        version = config.get("version", "gemm")
        backend = config.get("backend", "autoawq")
        if bits != 4:
            raise refuse(where, "AWQ", f"{brief(bits)} bits", _SUPPORTED)
        if not isinstance(version, str) or version.lower() != "gemm":
            raise refuse(where, "AWQ", f"version {brief(version)}", _SUPPORTED)
        if backend != "autoawq":
            raise refuse(where, "AWQ", f"the layout of {brief(backend)}", _SUPPORTED)
        self._group_size = group_size_of(config, where, "group_size", "q_group_size")

    def matrix(self, module: Module) -> QuantizedMatrix | None:
        """Transposed when it is loaded."""
        if "qweight" not in module.tensors:
            return None
        columns, eighths = module.expect("qweight", ("int32",), 2)
        rows = 8 * eighths
        count, _ = module.expect("scales", SCALE_TYPES, 2)
        module.expect_shape("scales", SCALE_TYPES, (count, rows))
        module.expect_shape("qzeros", ("int32",), (count, eighths))
        stored = module.groups(columns, count, self._group_size, "scales")
        size = stored if count > 1 else spread_size(columns)
        if columns % 2:
            raise refuse(module.where, "AWQ", f"rows of {columns} weights", "even numbers")
        scale = stored_scale_type(module.tensors["scales"].dtype)
        scheme = Scheme(4, size, scale, "zeros")

        def assemble(arrays: Arrays) -> QuantTensor:
            zeros = unpack_words(arrays["qzeros"], 4, AWQ_ORDER).T
            scales = arrays["scales"].T.astype(scale.numpy)
            codes = Codes(rows_of_awq(arrays["qweight"]), NIBBLES, columns)
            times = stored // size
            return QuantTensor(
                scheme, codes, np.repeat(scales, times, axis=1), np.repeat(zeros, times, axis=1)
            )

        return module.matrix("awq-q4", (rows, columns), scheme, ("qweight", "qzeros", "scales"), assemble)
