"""Checkpoints of compressed-tensors (llm-compressor): FP8, int8 and packed int4 or int8 weights.

By `format`:

    float-quantized  weight float8_e4m3fn [N, K]; weight_scale: one, [N, 1], or one for each block
    int-quantized    weight int8 [N, K]; weight_scale: one, [N, 1] or [N, K / g];
                     weight_zero_point int8, of the same shape, unless symmetric; weight_g_idx as below
    pack-quantized   weight_packed int32 [N, K * bits / 32]: codes of neighbouring columns, the first at the
                     lowest bits, each the value plus 2^(bits - 1); weight_shape: N and K;
                     weight_scale [N, K / g];
                     weight_zero_point int32 [N * bits / 32, K / g], packed along N, unless symmetric;
                     weight_g_idx [K]: the group of each column, if they were quantized in order of importance

A weight is scale (value - zero). Modules that `ignore` lists have a `weight` of another type and no scales.
Source: the package's compressors/quantized_compressors, and quantization/quant_args.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from kuiperllm.checkpoint.quantized.fields import as_bits, block_of
from kuiperllm.checkpoint.quantized.scaled import Block, matrix_of
from kuiperllm.errors import ConfigError
from kuiperllm.quant import Codes, QuantTensor, Scheme
from kuiperllm.quant.codes import dense_layout
from kuiperllm.quant.packed_words import WORD_BITS, reordered, unpack_words

_NAME = "compressed-tensors"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
_SUPPORTED = "FP8 (e4m3), int8, and packed int4 and int8 weights"
_CODES, _PACKED, _SCALES, _ZEROS, _ORDER = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
)


class CompressedTensors(Method):
    """What llm-compressor writes, as far as weights go; activations are not quantized here."""

    unused = frozenset(
        (
            "input_scale",
            "input_zero_point",
            "input_global_scale",
            "output_scale",
            "output_zero_point",
            "k_scale",
            "v_scale",
            "q_scale",
            "weight_shape",
            "weight_zero_point",
        )
    )

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        if config.get("format") not in _FORMATS:
            raise refuse(where, _NAME, f"the format {brief(config.get('format'))}", ", ".join(_FORMATS))
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise refuse(where, _NAME, f"sparse weights ({brief(sparsity.get('format'))})", "dense ones")
        self._bits = 0
        self._block: Block | None = None
        for weights in _weights(config, where):
            self._check(weights, where)

    def _check(self, weights: Mapping[str, Any], where: str) -> None:
        kind, bits = weights.get("type", "int"), as_bits(weights.get("num_bits", 8))
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)) or bits is None:
            what = f"weights of {brief(weights.get('num_bits'))} bits, {brief(kind)}"
            raise refuse(where, _NAME, what, _SUPPORTED)
        if kind == "int":
            if self._bits not in (0, bits):
                raise refuse(where, _NAME, "integers of 4 and of 8 bits in one file", "either")
            self._bits = bits
        if weights.get("strategy") == "block":
            self._block = block_of(weights.get("block_structure"), where, "block_structure")

    def matrix(self, module: Module) -> QuantizedMatrix | None:
        """Codes stay where they are, unless columns are in another order; scales may be repeated."""
        if _PACKED in module.tensors:
            return self._packed(module)
        if _SCALES not in module.tensors:
            return None
        is_e4m3 = _CODES in module.tensors and module.tensors[_CODES].dtype == "float8_e4m3fn"
        return matrix_of(
            module,
            _SCALES,
            "fp8-e4m3" if is_e4m3 else "int8",
            block=self._block if is_e4m3 else None,
            zeros=_ZEROS if _ZEROS in module.tensors and not is_e4m3 else None,
            order=_ORDER if _ORDER in module.tensors else None,
        )

    def _packed(self, module: Module) -> QuantizedMatrix:
        bits = self._bits or 4
        per_word = WORD_BITS // bits
        rows, width = module.expect(_PACKED, ("int32",), 2)
        columns = width * per_word
        _, count = module.expect(_SCALES, SCALE_TYPES, 2)
        module.expect_shape(_SCALES, SCALE_TYPES, (rows, count))
        stored = module.groups(columns, count, None, _SCALES)
        size = stored if count > 1 else spread_size(columns)
        parts = [_PACKED, _SCALES]
        if has_zeros := _ZEROS in module.tensors:
            module.expect_shape(_ZEROS, ("int32",), (-(-rows // per_word), count))
            parts.append(_ZEROS)
        if _ORDER in module.tensors:
            module.expect_shape(_ORDER, ("int32", "int64"), (columns,))
            parts.append(_ORDER)
        scale = stored_scale_type(module.tensors[_SCALES].dtype)
        scheme = Scheme(bits, size, scale, "zeros" if has_zeros else "middle")

        def assemble(arrays: Arrays) -> QuantTensor:
            order = column_order(arrays.get(_ORDER), stored, count)
            data = arrays[_PACKED].view(np.uint8)
            if order is not None:
                data = reordered(data, bits, order)
            zeros: NDArray[np.uint8] | None = None
            if has_zeros:
                zeros = unpack_words(arrays[_ZEROS].T, bits)[:, :rows].T
                zeros = np.repeat(zeros, stored // size, axis=1)
            return QuantTensor(
                scheme,
                Codes(data, dense_layout(bits), columns),
                np.repeat(arrays[_SCALES].astype(scale.numpy), stored // size, axis=1),
                zeros,
                columns=None if order is None else order.astype(np.int32),
            )

        return module.matrix(f"int{bits}", (rows, columns), scheme, parts, assemble)


def _weights(config: Mapping[str, Any], where: str) -> Iterator[Mapping[str, Any]]:
    """How each group of modules has its weights quantized."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(
            f"{where}: quantization_config: config_groups must describe groups, not {brief(groups)}"
        )
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ConfigError(
                f"{where}: quantization_config: {brief(name)} does not say how weights are quantized"
            )
        yield weights
