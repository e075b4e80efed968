"""A linear layer on normalized input, in one pass where the device can."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import DeviceError, ShapeError
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation
from kuiperllm.ops.linear import SCHEMES, LinearWeight, Rows, format_of, pack, random_rows
from kuiperllm.ops.linear import reference as linear_reference
from kuiperllm.ops.rms_norm import reference as norm_reference
from kuiperllm.quant import QuantTensor, Scheme

CONTRACT = Contract(
    "norm_linear",
    x="T K : activation",
    norm_weight="K",
    out="T N : float32 float16 bfloat16",
)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: LinearWeight,
    *,
    dtype: DType | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """linear(rms_norm(x)): a projection at the head of a layer, or the logits.

    Args:
        x: [T, K].
        norm_weight: float32 [K].
        eps: as for `rms_norm`.
        weight: [N, K], see `linear`.
        dtype: of the result: that of x (default) or float32.
        out: [T, N], where the result goes (default: a new tensor).

    Raises:
        ShapeError: the shapes do not match.
        DTypeError: a tensor has another type than stated.
        KernelError: `out` is neither of x's type nor float32.
        DeviceError: the operands live on different devices.
    """
    if out is None:
        out = Tensor.empty((x.shape[0], weight.out_features), dtype or x.dtype, x.device)
    sizes = CONTRACT.check(x, norm_weight, out)
    check_weight("norm_linear", weight, x, sizes["K"], sizes["N"])
    implementation("norm_linear", x.device, x.dtype).norm_linear(x, norm_weight, eps, weight, out)
    return out


def check_weight(op: str, weight: LinearWeight, x: Tensor, columns: int, rows: int) -> None:
    """Refuse weights that are not [rows, columns], or not where x is.

    Raises:
        ShapeError: they have another shape.
        DeviceError: they live elsewhere.
    """
    if (weight.out_features, weight.in_features) != (rows, columns):
        raise ShapeError(
            f"{op}: x {list(x.shape)} and a result of {rows} columns do not fit weights "
            f"[{weight.out_features}, {weight.in_features}]"
        )
    if weight.device is not x.device:
        raise DeviceError(f"{op}: x is on {x.device}, the weights are on {weight.device}")


def reference(
    x: NDArray[Any],
    norm_weight: NDArray[Any],
    eps: float,
    rows: Rows,
    bias: NDArray[Any] | None = None,
    *,
    device: Device,
) -> NDArray[Any]:
    """Norm, then product, as the device rounds in between."""
    rounding = implementation("linear", device).rounding(format_of(rows), *x.shape)
    return linear_reference(norm_reference(x, norm_weight, eps), rows, bias, rounding=rounding)


def prepare(
    x: Tensor, norm_weight: Tensor, eps: float, rows: Tensor | QuantTensor, bias: Tensor | None = None
) -> dict[str, Any]:
    """The arguments of a case with its weights packed."""
    return {"x": x, "norm_weight": norm_weight, "eps": eps, "weight": pack(rows, bias, x.device)}


def inputs(tokens: int, n: int, k: int, format: str | Scheme, *, bias: bool = False) -> Any:
    """Arguments of a case."""

    def make(rng: np.random.Generator) -> dict[str, Any]:
        made: dict[str, Any] = {
            "x": rng.standard_normal((tokens, k), np.float32),
            "norm_weight": rng.uniform(0.5, 1.5, k).astype(np.float32),
            "eps": 1e-5,
            "rows": random_rows(rng, n, k, format),
        }
        if bias:
            made["bias"] = rng.standard_normal(n, np.float32)
        return made

    return make


SHAPES: tuple[tuple[str | Scheme, int, int, int, bool], ...] = (
    ("float32", 1, 40, 64, True),
    ("float32", 7, 34, 33, False),
    ("float32", 20, 66, 96, True),
    ("float16", 1, 130, 256, False),
    ("float16", 12, 48, 128, True),
    ("bfloat16", 1, 300, 512, True),
    ("bfloat16", 3, 72, 896, False),
    ("bfloat16", 8, 32, 1024, True),
    ("bfloat16", 1, 70, 896, False),
    ("bfloat16", 2, 90, 2048, True),
    ("bfloat16", 37, 96, 192, False),
    ("float16", 5, 46, 1024, False),
    ("float32", 8, 38, 2048, False),
    (SCHEMES["q8-g32"], 1, 64, 256, True),
    (SCHEMES["q8-g64"], 5, 48, 384, False),
    (SCHEMES["q8-g64"], 1, 62, 896, False),
    (SCHEMES["q8-g128"], 19, 80, 256, True),
    (SCHEMES["q4-g32"], 2, 66, 1024, True),
    (SCHEMES["q4-g128-zeros"], 1, 70, 384, False),
    (SCHEMES["q4-g32"], 19, 96, 1280, True),
    (SCHEMES["q4-k"], 8, 34, 768, False),
    (SCHEMES["q4-k"], 37, 64, 512, False),
    (SCHEMES["q6-k"], 1, 90, 512, True),
    (SCHEMES["f8-g128"], 3, 40, 256, False),
)
"""Format, tokens, N (even), K and bias of the cases."""


def name_of(format: str | Scheme, tokens: int, n: int, k: int) -> str:
    """The name of a case."""
    return f"{format.name if isinstance(format, Scheme) else format}-{tokens}x{n}x{k}"


CASES = [
    Case(
        name_of(format, tokens, n, k),
        norm_linear,
        reference,
        inputs(tokens, n, k, format, bias=bias),
        rtol=1e-5,
        atol=3e-5,
        activations=("x",),
        prepare=prepare,
        device_reference=True,
    )
    for format, tokens, n, k, bias in SHAPES
]
