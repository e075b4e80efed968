"""`norm_linear` on CUDA: in one kernel for few rows of x."""

from __future__ import annotations

from kuiperllm.core import DType, Tensor
from kuiperllm.ops.contract import ACTIVATIONS
from kuiperllm.ops.dispatch import no_kernel
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.ops.linear.gemm import gemm
from kuiperllm.ops.linear.gemv import gemv, suits_gemv
from kuiperllm.ops.rms_norm import rms_norm

DTYPES = ACTIVATIONS


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight, out: Tensor) -> None:
    """Normalize the rows of x [T, K], multiply; the result is rounded to the type of `out`.

    Raises:
        KernelError: `out` is neither of x's type nor float32.
    """
    if out.dtype not in (x.dtype, DType.float32):
        why = f"results of {x.dtype} activations are {x.dtype} or float32, not {out.dtype}"
        raise no_kernel("norm_linear", str(x.device), {"cuda": why})
    if suits_gemv(x.shape[0], weight):
        gemv(x, weight, out, norm_weight=norm_weight, eps=eps)
    else:
        gemm(rms_norm(x, norm_weight, eps), weight, out)
