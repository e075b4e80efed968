"""`norm_linear` on the CPU: the two operators it is made of."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.rms_norm import rms_norm


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight, out: Tensor) -> None:
    """Normalize the rows of x [T, K], then multiply."""
    linear(rms_norm(x, norm_weight, eps), weight, out=out)
