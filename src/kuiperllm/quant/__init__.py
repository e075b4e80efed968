"""Quantized weights: what a code stands for, how codes lie in a file, and how weights are rounded to them."""

from kuiperllm.quant.codes import CodeLayout, Codes, Plane
from kuiperllm.quant.q8 import int8_tensor, quantize_q8
from kuiperllm.quant.rounding import quantize
from kuiperllm.quant.scheme import AT_LOAD, SUPER_BLOCK, Coding, Scheme, q4, q8
from kuiperllm.quant.tensor import QuantTensor, concatenate

__all__ = [
    "AT_LOAD",
    "SUPER_BLOCK",
    "CodeLayout",
    "Codes",
    "Coding",
    "Plane",
    "QuantTensor",
    "Scheme",
    "concatenate",
    "int8_tensor",
    "q4",
    "q8",
    "quantize",
    "quantize_q8",
]
