"""FP8 checkpoints with the methods `fp8` and `fbgemm_fp8`: e4m3 numbers with scales.

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  float32, one for each block of `weight_block_size` rows and columns, 128 x 128 if that
                      is not stated, or one alone; despite its name a weight is the number times the scale
    weight_scale      float32, instead: one for the tensor, or [N, 1]

Modules that were not converted have a `weight` of another type and no scales.
Source: transformers' integrations/finegrained_fp8.py, and vLLM's quantization/fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.quantized.base import Method, Module, QuantizedMatrix, refuse
from kuiperllm.checkpoint.quantized.fields import block_of
from kuiperllm.checkpoint.quantized.scaled import matrix_of

_USUAL_BLOCK = (128, 128)
_SCALES, _BLOCK_SCALES = "weight_scale", "weight_scale_inv"


class Fp8(Method):
    """e4m3 for the tensor, for rows or for blocks."""

    unused = frozenset(
        ("input_scale", "input_scale_ub", "activation_scale", "k_scale", "v_scale", "kv_scale")
    )

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        kind = config.get("fmt", "e4m3")
        if kind not in ("e4m3", "float8_e4m3fn"):
            raise refuse(where, "FP8", f"numbers of {brief(kind)}", "e4m3")
        self._block = block_of(config.get("weight_block_size"), where, "weight_block_size")

    def matrix(self, module: Module) -> QuantizedMatrix | None:
        """Numbers stay where they are, scales are repeated."""
        if _BLOCK_SCALES in module.tensors:
            block = self._block
            if block is None and prod(module.tensors[_BLOCK_SCALES].shape) > 1:
                block = _USUAL_BLOCK
            return matrix_of(module, _BLOCK_SCALES, "fp8-e4m3", block=block)
        if _SCALES in module.tensors:
            return matrix_of(module, _SCALES, "fp8-e4m3")
        return None
