"""`norm_swiglu` on the CPU: the three operators it is made of."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.ops.silu_mul import silu_mul


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight, out: Tensor) -> None:
    """Normalize the rows of x [T, K], multiply, and gate."""
    silu_mul(linear(rms_norm(x, norm_weight, eps), weight), out=out)
