"""`norm_linear` on the CPU: the two operators it is made of, or one where rounding x can normalize it."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.linear.cpu import rounds_to_int8
from kuiperllm.ops.linear.cpu_codes import Norm, linear_codes
from kuiperllm.ops.rms_norm import rms_norm


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight, out: Tensor) -> None:
    """Normalize the rows of x [T, K], then multiply."""
    if rounds_to_int8(x, weight):
        linear_codes(x, weight, out, accumulate=False, norm=Norm(norm_weight, eps))
    else:
        linear(rms_norm(x, norm_weight, eps), weight, out=out)
