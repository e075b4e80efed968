"""KuiperLLM's own quantized checkpoints, in ordinary safetensors: reading, and the layout for writing.

config.json has

    "quantization_config": {"quant_method": "kuiper", "bits": 8, "group_size": 64, "zero_point": false}

with the bits and group size of most matrices. What holds for each matrix follows from its tensors:

    <module>.weight        int8 [N, K]: 8 bits, values; or
                           uint8 [N, K / 2]: 4 bits, codes 0 ... 15, of two neighbouring columns the first one
                           in the low half of the byte
    <module>.weight_scale  float16 or float32 [N, K / g]: the scale s of each group of g neighbouring columns
    <module>.weight_zero   uint8 [N, K / g], only of 4 bits: zero points z

A weight is s q for an int8 value q, s (c - 8) for a code c, and s (c - z) with zero points. Matrices without
scales are floating point, as all other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.quantized.base import Arrays, Method, Module, QuantizedMatrix, refuse
from kuiperllm.checkpoint.quantized.fields import as_bits
from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError
from kuiperllm.quant import Codes, QuantTensor, Scheme
from kuiperllm.quant.codes import INT8, NIBBLES

QUANT_METHOD = "kuiper"
_CODES, _SCALES, _ZEROS = "weight", "weight_scale", "weight_zero"
_SCALE_TYPES = ("float16", "float32")


class Part(NamedTuple):
    """A tensor that belongs to a matrix `<module>.weight`."""

    suffix: str
    """What its name has behind `<module>.weight`."""
    dtype: DType
    shape: tuple[int, int]


def can_store(scheme: Scheme) -> bool:
    """Whether matrices of a scheme can be written."""
    return not scheme.has_super_blocks and (scheme.bits, scheme.coding) in (
        (8, "middle"),
        (4, "middle"),
        (4, "zeros"),
    )


def config_of(scheme: Scheme) -> dict[str, Any]:
    """The contents of `quantization_config` where most matrices are of this scheme."""
    return {
        "quant_method": QUANT_METHOD,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": scheme.has_zeros,
    }


def parts_of(scheme: Scheme, rows: int, columns: int) -> tuple[Part, ...]:
    """The tensors of a matrix [rows, columns], in the order of `encode`."""
    groups = rows, columns // scheme.group_size
    codes = Part("", DType.int8, (rows, columns))
    if scheme.bits == 4:
        codes = Part("", DType.uint8, (rows, columns // 2))
    scales = Part("_scale", scheme.scale, groups)
    return (codes, scales, Part("_zero", DType.uint8, groups)) if scheme.has_zeros else (codes, scales)


def encode(weight: QuantTensor) -> tuple[NDArray[Any], ...]:
    """The tensors of a matrix, or of some of its rows."""
    layout = INT8 if weight.scheme.bits == 8 else NIBBLES
    values: NDArray[Any] = weight.codes.data
    if weight.codes.layout != layout:
        values = Codes.packed(weight.codes.unpack(), layout).data
    if layout == INT8:
        values = values.view(np.int8)
    return (values, weight.scales) if weight.zeros is None else (values, weight.scales, weight.zeros)


class Ours(Method):
    """Matrices as `kuiper export` writes them."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        if as_bits(config.get("bits")) is None:
            raise refuse(where, QUANT_METHOD, f"{brief(config.get('bits'))} bits", "4 and 8 bits")

    def matrix(self, module: Module) -> QuantizedMatrix | None:
        """Bits and groups by the types and shapes of the tensors."""
        if _SCALES not in module.tensors:
            return None
        rows, width = module.expect(_CODES, ("int8", "uint8"), 2)
        bits = 8 if module.tensors[_CODES].dtype == "int8" else 4
        columns = width * 8 // bits
        has_zeros = _ZEROS in module.tensors
        if bits == 8 and has_zeros:
            raise CheckpointError(f"{module.where}: {brief(module.name)} has int8 values and zero points")
        _, count = module.expect(_SCALES, _SCALE_TYPES, 2)
        module.expect_shape(_SCALES, _SCALE_TYPES, (rows, count))
        group_size = module.groups(columns, count, None, _SCALES)
        scale = DType(module.tensors[_SCALES].dtype)
        scheme = Scheme(bits, group_size, scale, "zeros" if has_zeros else "middle")
        parts = [_CODES, _SCALES]
        if has_zeros:
            module.expect_shape(_ZEROS, ("uint8",), (rows, count))
            parts.append(_ZEROS)

        def assemble(arrays: Arrays) -> QuantTensor:
            stored = arrays[_CODES]
            codes = Codes.of_int8(stored) if bits == 8 else Codes(stored, NIBBLES, columns)
            return QuantTensor(scheme, codes, arrays[_SCALES], arrays.get(_ZEROS))

        return module.matrix(scheme.name, (rows, columns), scheme, parts, assemble)
