"""`linear` on CUDA: few rows of x are limited by reading the weights, many by multiplying."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.ops.contract import ACTIVATIONS
from kuiperllm.ops.linear.cuda_weights import activation_dtype, packed_sizes, rounding, write_rows
from kuiperllm.ops.linear.gemm import gemm
from kuiperllm.ops.linear.gemv import gemv, suits_gemv
from kuiperllm.ops.linear.weight import LinearWeight

__all__ = ["DTYPES", "activation_dtype", "linear", "packed_sizes", "rounding", "write_rows"]

DTYPES = ACTIVATIONS


def linear(x: Tensor, weight: LinearWeight, out: Tensor, accumulate: bool) -> None:
    """y = x W^T + bias; see `kuiperllm.ops.linear`."""
    product = gemv if suits_gemv(x.shape[0], weight) else gemm
    product(x, weight, out, accumulate=accumulate)
