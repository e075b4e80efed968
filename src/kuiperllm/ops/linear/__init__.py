"""Matrix multiplication by the weights of a layer: y = x W^T + bias."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import DeviceError, ShapeError
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation
from kuiperllm.ops.linear.weight import LinearWeight, Rounding, Rows, WeightFormat, can_be_kept, format_of
from kuiperllm.quant import QuantTensor, int8_tensor, quantize_q8

__all__ = [
    "CASES",
    "CONTRACT",
    "LinearWeight",
    "Rows",
    "WeightFormat",
    "activation_dtype",
    "can_be_kept",
    "format_of",
    "linear",
    "reference",
]

CONTRACT = Contract("linear", x="T K : activation", out="T N : activation")


def linear(x: Tensor, weight: LinearWeight, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """x W^T + bias.

    With int8 groups on the CPU, x is rounded to int8 in groups of the same size first, as llama.cpp and
    llama2.c do. With more than one row, x is rounded to bfloat16 instead where the processor multiplies
    matrices of that natively (AMX; int8 groups are then expanded to bfloat16 as well), and so it is for
    bfloat16 weights (AVX512_BF16). Sums are float32.

    Args:
        x: [T, K].
        weight: [N, K] in any `WeightFormat`.
        out: [T, N], where the result goes (default: a new tensor). Must not overlap `x`.
        accumulate: add the result to what `out` holds.

    Raises:
        ShapeError: the shapes do not match.
        DTypeError: x and out are not of one floating-point type.
        DeviceError: x and the weights live on different devices.
    """
    if out is None:
        out = Tensor.empty((x.shape[0], weight.out_features), x.dtype, x.device)
        accumulate = False
    sizes = CONTRACT.check(x, out)
    if sizes["K"] != weight.in_features or sizes["N"] != weight.out_features:
        raise ShapeError(
            f"linear: x {list(x.shape)} and out {list(out.shape)} do not fit weights "
            f"[N, K] = [{weight.out_features}, {weight.in_features}] (contract: {CONTRACT.text})"
        )
    if weight.device is not x.device:
        raise DeviceError(f"linear: x is on {x.device}, the weights are on {weight.device}")
    implementation("linear", x.device, x.dtype).linear(x, weight, out, accumulate)
    return out


def activation_dtype(weight: LinearWeight) -> DType:
    """The type of activations that the kernels of the weights' device take fastest."""
    kind: DType = implementation("linear", weight.device).activation_dtype(weight.format)
    return kind


def reference(
    x: NDArray[Any], weight: Rows, bias: NDArray[Any] | None = None, *, rounding: Rounding = None
) -> NDArray[Any]:
    """The product in float64, of x rounded to int8 groups, bfloat16, or not.

    To be multiplied as bfloat16, quantized weights are rounded to that as well.
    """
    matrix = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    if isinstance(rounding, int):
        x = round_to_groups(x, rounding)
    elif rounding is DType.bfloat16:
        x = x.astype(DType.bfloat16.numpy)
        if isinstance(weight, QuantTensor):  # expanded for AMX, half a unit rounds away from zero
            bits = matrix.view(np.uint32) + np.uint32(0x8000)
            matrix = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    product: NDArray[Any] = x.astype(np.float64) @ matrix.astype(np.float64).T
    return product if bias is None else product + bias.astype(np.float64)


def round_to_groups(x: NDArray[Any], group_size: int) -> NDArray[Any]:
    """x as int8 groups hold it: scale = largest / 127, values rounded to nearest."""
    groups = x.astype(np.float32).reshape(x.shape[0], -1, group_size)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    rounded: NDArray[Any] = np.rint(groups * inverse) * (largest / np.float32(127))
    return rounded.reshape(x.shape)


def pack(rows: Tensor | QuantTensor, bias: Tensor | None, device: Device) -> LinearWeight:
    """Weights of a case, as a checkpoint holds them, laid out for a device."""
    return LinearWeight.pack(
        rows if isinstance(rows, QuantTensor) else rows.numpy(),
        None if bias is None else bias.numpy(),
        device=device,
    )


def _prepare(
    x: Tensor, rows: Tensor | QuantTensor, bias: Tensor | None = None, out: Tensor | None = None
) -> dict[str, Any]:
    return {"x": x, "weight": pack(rows, bias, x.device), "out": out, "accumulate": out is not None}


def _reference(
    x: NDArray[Any],
    rows: Rows,
    bias: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
    *,
    device: Device,
) -> NDArray[Any]:
    rounding = implementation("linear", device).rounding(format_of(rows), *x.shape)
    product = reference(x, rows, bias, rounding=rounding)
    return product if out is None else np.add(product, out)


def _inputs(
    tokens: int, n: int, k: int, format: str, *, group: int = 0, bias: bool = False, add: bool = False
) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        w = rng.standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))
        made: dict[str, Any] = {"x": rng.standard_normal((tokens, k), np.float32)}
        made["rows"] = quantize_q8(w, group) if group else w.astype(DType(format).numpy)
        if format == "float32" and group:  # scales in float32, as llama2.c has them
            values = made["rows"].codes.data.view(np.int8)
            made["rows"] = int8_tensor(values, made["rows"].scales.astype(np.float32))
        if bias:
            made["bias"] = rng.standard_normal(n, np.float32)
        if add:
            made["out"] = rng.standard_normal((tokens, n), np.float32)
        return made

    return make


def _case(name: str, *shape: Any, benchmark: bool = False, **options: Any) -> Case:
    make = _inputs(*shape, **options)
    tokens, n, k, _ = shape
    return Case(
        name,
        linear,
        _reference,
        make,
        rtol=1e-5,
        atol=2e-5,
        writes=("out",) if options.get("add") else (),
        activations=("x", "out"),
        prepare=_prepare,
        device_reference=True,
        benchmark=benchmark,
        operations=2 * tokens * n * k,
    )


CASES = [
    *(
        _case(f"{format}-{tokens}x{n}x{k}", tokens, n, k, format)
        for format in ("float32", "float16", "bfloat16")
        for tokens, n, k in ((1, 1, 1), (1, 16, 2), (1, 37, 33), (2, 48, 64), (7, 100, 31), (13, 33, 528))
    ),
    *(
        _case(f"q8-g{group}-{tokens}x{n}x{k}", tokens, n, k, "float16", group=group)
        for group in (32, 64, 128)
        for tokens, n, k in ((1, 16, 128), (1, 37, 256), (2, 33, 128), (7, 100, 384), (13, 48, 2176))
    ),
    _case("q8-float32-scales-1", 1, 40, 128, "float32", group=64),
    _case("q8-float32-scales-5", 5, 40, 128, "float32", group=64),
    *(
        _case(
            f"{'q8' if group else format}-bias-add-{tokens}",
            tokens,
            50,
            64,
            format,
            group=group,
            bias=True,
            add=True,
        )
        for format, group in (("float32", 0), ("float16", 0), ("bfloat16", 0), ("float16", 32))
        for tokens in (1, 9)
    ),
    *(  # few rows of x: long rows of weights, an odd number of them
        _case(f"{format}-{tokens}x{n}x{k}", tokens, n, k, format, bias=add, add=add)
        for format, tokens, n, k, add in (
            ("bfloat16", 1, 71, 896, True),
            ("bfloat16", 1, 35, 4864, False),
            ("bfloat16", 2, 45, 1024, False),
            ("bfloat16", 8, 131, 2048, True),
            ("float16", 5, 67, 896, True),
            ("float32", 1, 43, 1024, True),
        )
    ),
    *(  # many rows of x: tiles in part outside of the matrices, rows that are not aligned
        _case(f"{format}-{tokens}x{n}x{k}", tokens, n, k, format, bias=add, add=add)
        for format in ("float32", "float16", "bfloat16")
        for tokens, n, k, add in (
            (9, 37, 72, False),
            (20, 130, 264, True),
            (129, 72, 45, True),
            (300, 24, 40, False),
        )
    ),
    *(
        _case(f"q8-g{group}-{tokens}x{n}x{k}", tokens, n, k, "float16", group=group, bias=add, add=add)
        for tokens, n, k, group, add in (
            (9, 40, 96, 32, True),
            (33, 136, 320, 64, False),
            (130, 130, 384, 128, True),
            (11, 50, 48, 16, False),
        )
    ),
    *(
        _case(f"{'q8' if group else format}-{name}", tokens, n, 2048, format, group=group, benchmark=True)
        for format, group in (("bfloat16", 0), ("float16", 64))
        for name, tokens, n in (("decode", 1, 8192), ("prefill", 128, 2048))
    ),
]
