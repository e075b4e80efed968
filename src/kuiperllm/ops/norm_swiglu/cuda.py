"""`norm_swiglu` on CUDA: in one kernel for few rows of x, in two for many."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.ops.contract import ACTIVATIONS
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.ops.linear.gemm import gemm
from kuiperllm.ops.linear.gemv import gemv, suits_gemv
from kuiperllm.ops.rms_norm import rms_norm

DTYPES = ACTIVATIONS


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight, out: Tensor) -> None:
    """Normalize the rows of x [T, K], multiply, and gate."""
    if suits_gemv(x.shape[0], weight):
        gemv(x, weight, out, norm_weight=norm_weight, eps=eps, swiglu=True)
    else:
        gemm(rms_norm(x, norm_weight, eps), weight, out, swiglu=True)
