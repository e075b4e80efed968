"""`linear` on the CPU: which kernels multiply, by weight format, rows of x and processor level."""

from __future__ import annotations

from kuiperllm.backends.cpu.features import target
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.cpu_codes import linear_codes, x_group
from kuiperllm.ops.linear.cpu_float import gemm_amx, gemm_bf16, linear_float
from kuiperllm.ops.linear.cpu_pack import packed_sizes as packed_sizes
from kuiperllm.ops.linear.cpu_pack import write_rows as write_rows
from kuiperllm.ops.linear.weight import LinearWeight, Rounding, WeightFormat
from kuiperllm.quant import Scheme


def linear(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    """y = x W^T + bias; see `kuiperllm.ops.linear`."""
    if x.shape[0] == 0:
        return
    if _uses_amx(weight.format, *x.shape):
        gemm_amx(x, weight, out, accumulate)
    elif _uses_bf16_dot(weight.format, *x.shape):
        gemm_bf16(x, weight, out, accumulate)
    elif _is_integer(weight.format):
        linear_codes(x, weight, out, accumulate)
    else:
        linear_float(x, weight, out, accumulate)


def rounds_to_int8(x: Tensor, weight: LinearWeight) -> bool:
    """Whether `linear` would take x in int8 groups, so that `linear_codes` can be called for it."""
    return _is_integer(weight.format) and x.shape[0] > 0 and not _uses_amx(weight.format, *x.shape)


def _is_integer(format: WeightFormat) -> bool:
    """Whether weights are multiplied by the int8 dot product, where nothing better takes them."""
    return isinstance(format, Scheme) and format.coding != "e4m3"


def _uses_amx(format: WeightFormat, tokens: int, k: int) -> bool:
    takes = format is DType.bfloat16 or isinstance(format, Scheme)
    return tokens > 1 and takes and k % 32 == 0 and target().at_least("amx")


def _uses_bf16_dot(format: WeightFormat, tokens: int, k: int) -> bool:
    takes = format is DType.bfloat16 or (isinstance(format, Scheme) and not _is_integer(format))
    return tokens > 1 and takes and k % 16 == 0 and target().has_bf16


def rounding(format: WeightFormat, tokens: int, k: int) -> Rounding:
    """What x is rounded to before it is multiplied: int8 groups, bfloat16, or nothing."""
    if _uses_amx(format, tokens, k) or _uses_bf16_dot(format, tokens, k):
        return DType.bfloat16
    if isinstance(format, Scheme) and _is_integer(format):
        return x_group(format, k)
    return None


def activation_dtype(format: WeightFormat) -> DType:
    """float32: the CPU's vectors are as wide as its memory is fast."""
    return DType.float32
