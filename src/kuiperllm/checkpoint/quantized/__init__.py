"""Quantized safetensors: which tensors make a matrix, by the `quantization_config` of config.json."""

from kuiperllm.checkpoint.quantized.base import QuantizedMatrix
from kuiperllm.checkpoint.quantized.reading import Contents, read_contents

__all__ = ["Contents", "QuantizedMatrix", "read_contents"]
