"""`norm_swiglu` on the CPU: the three operators it is made of, or two where a product gates its result."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.linear.cpu import linear_gated
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.ops.silu_mul import silu_mul


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight, out: Tensor) -> None:
    """Normalize the rows of x [T, K], multiply, and gate."""
    normalized = rms_norm(x, norm_weight, eps)
    if not linear_gated(normalized, weight, out):
        silu_mul(linear(normalized, weight), out=out)
