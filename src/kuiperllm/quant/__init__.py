"""Formats of quantized weights: how a block packs and unpacks. One file per format."""

from kuiperllm.quant.q8 import Q8Tensor, quantize_q8

__all__ = ["Q8Tensor", "quantize_q8"]
