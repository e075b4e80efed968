"""The first half of a SwiGLU feed-forward layer: norm, both projections and the gate."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Device, Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation
from kuiperllm.ops.linear import LinearWeight, Rows
from kuiperllm.ops.norm_linear import SHAPES, check_weight, inputs, name_of, prepare
from kuiperllm.ops.norm_linear import reference as norm_linear_reference
from kuiperllm.ops.silu_mul import reference as silu_mul_reference

CONTRACT = Contract("norm_swiglu", x="T K : activation", norm_weight="K", out="T F : activation")


def norm_swiglu(
    x: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight, *, out: Tensor | None = None
) -> Tensor:
    """silu(gate) * up of the normalized x (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: [T, K].
        norm_weight: float32 [K].
        eps: as for `rms_norm`.
        weight: [2F, K]: F rows of the gate's projection, then F rows of the other.
        out: [T, F], where the result goes (default: a new tensor).

    Raises:
        ShapeError: the shapes do not match, or the weights have an odd number of rows.
        DTypeError: a tensor has another type than stated.
        DeviceError: the operands live on different devices.
    """
    if out is None:
        out = Tensor.empty((x.shape[0], weight.out_features // 2), x.dtype, x.device)
    sizes = CONTRACT.check(x, norm_weight, out)
    check_weight("norm_swiglu", weight, x, sizes["K"], 2 * sizes["F"])
    implementation("norm_swiglu", x.device, x.dtype).norm_swiglu(x, norm_weight, eps, weight, out)
    return out


def reference(
    x: NDArray[Any],
    norm_weight: NDArray[Any],
    eps: float,
    rows: Rows,
    bias: NDArray[Any] | None = None,
    *,
    device: Device,
) -> NDArray[np.float32]:
    """Norm, product and gate."""
    return silu_mul_reference(norm_linear_reference(x, norm_weight, eps, rows, bias, device=device))


CASES = [
    Case(
        name_of(format, tokens, n, k),
        norm_swiglu,
        reference,
        inputs(tokens, n, k, format, bias=bias),
        rtol=2e-5,
        atol=5e-5,
        activations=("x",),
        prepare=prepare,
        device_reference=True,
    )
    for format, tokens, n, k, bias in SHAPES
]
