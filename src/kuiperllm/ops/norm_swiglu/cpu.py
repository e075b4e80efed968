"""`norm_swiglu` on the CPU: the operators it is made of, or one where the product can gate its own result."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.ops.linear.cpu import rounds_to_int8
from kuiperllm.ops.linear.cpu_codes import Norm, can_gate, linear_codes_gated
from kuiperllm.ops.norm_linear import norm_linear
from kuiperllm.ops.silu_mul import silu_mul


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight, out: Tensor) -> None:
    """Normalize the rows of x [T, K], multiply, and gate."""
    if rounds_to_int8(x, weight) and can_gate(x, weight):
        linear_codes_gated(x, weight, out, Norm(norm_weight, eps))
    else:
        silu_mul(norm_linear(x, norm_weight, eps, weight), out=out)
