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
from kuiperllm.quant import QuantTensor, Scheme, q4, q8
from kuiperllm.quant.synthetic import random_tensor

__all__ = [
    "CASES",
    "CONTRACT",
    "SCHEMES",
    "LinearWeight",
    "Rows",
    "WeightFormat",
    "activation_dtype",
    "can_be_kept",
    "format_of",
    "linear",
    "pack",
    "random_rows",
    "reference",
]

CONTRACT = Contract("linear", x="T K : activation", out="T N : activation")


def linear(x: Tensor, weight: LinearWeight, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """x W^T + bias.

    With quantized weights on the CPU, x is rounded to int8 groups first, as llama.cpp and llama2.c do (see
    `round_to_groups`; e4m3 weights are multiplied in float32). With more than one row, x is rounded to
    bfloat16 instead where the processor multiplies matrices of that natively (AMX; codes are then expanded to
    bfloat16 as well), and so it is for bfloat16 and e4m3 weights with AVX512_BF16. Sums are float32.

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
    if isinstance(weight, QuantTensor) and weight.columns is not None:  # groups are those of stored columns
        x, matrix = x[:, weight.columns], matrix[:, weight.columns]
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
    """x as int8 groups hold it: scale = largest / 127, values rounded to nearest.

    Groups that reach no further than 1e-30 become zeros; the last one may be shorter.
    """
    rows, columns = x.shape
    padded = np.pad(x.astype(np.float32), ((0, 0), (0, -columns % group_size)))
    groups = padded.reshape(rows, -1, group_size)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 1e-30)
    rounded = np.rint(groups * inverse) * (largest / np.float32(127))
    values: NDArray[Any] = rounded.reshape(rows, -1)[:, :columns]
    return values


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


def random_rows(
    rng: np.random.Generator, n: int, k: int, format: str | Scheme, *, shuffled: bool = False
) -> Rows:
    """Weights of a case: [n, k] in a floating-point type or a scheme; `shuffled`: as `random_tensor`."""
    if isinstance(format, Scheme):
        return random_tensor(rng, format, n, k, shuffled=shuffled)
    weights = rng.standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))
    rows: NDArray[Any] = weights.astype(DType(format).numpy)
    return rows


def _inputs(
    tokens: int,
    n: int,
    k: int,
    format: str | Scheme,
    *,
    bias: bool = False,
    add: bool = False,
    shuffled: bool = False,
) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        made: dict[str, Any] = {"x": rng.standard_normal((tokens, k), np.float32)}
        made["rows"] = random_rows(rng, n, k, format, shuffled=shuffled)
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


SCHEMES = {
    "q8-g16": q8(16),
    "q8-g32": q8(32),
    "q8-g64": q8(64),
    "q8-g64-float32": q8(64, DType.float32),
    "q8-g128": q8(128),
    "q8-g32-zeros": Scheme(8, 32, DType.float16, "zeros"),
    "q6-k": Scheme(6, 16, DType.int8),
    "q5-g32": Scheme(5, 32),
    "q5-g32-minimum": Scheme(5, 32, DType.float16, "minimum"),
    "q5-k": Scheme(5, 32, DType.int8, "minimum"),
    "q4-g32": q4(32),
    "q4-g64": q4(64),
    "q4-g128": q4(128),
    "q4-g32-minimum": Scheme(4, 32, DType.float16, "minimum"),
    "q4-g128-zeros": q4(128, symmetric=False),
    "q4-k": Scheme(4, 32, DType.int8, "minimum"),
    "q3-g64-zeros": Scheme(3, 64, DType.float16, "zeros"),
    "q3-k": Scheme(3, 16, DType.int8),
    "q2-k": Scheme(2, 16, DType.int8, "minimum"),
    "f8-g128": Scheme(8, 128, DType.float32, "e4m3"),
}
"""Schemes of the cases, by name: each number of bits, coding and type of scales."""

_FEW, _MANY = (2, 5, 8, 3), (13, 40)


def _scheme_cases(index: int, name: str, scheme: Scheme) -> list[Case]:
    """One row of x, a few and many of them; rows of W that blocks do not divide; the fewest columns."""
    unit = max(scheme.columns_unit, 32)
    few, many = _FEW[index % len(_FEW)], _MANY[index % len(_MANY)]
    shapes = (1, 37, 4 * unit), (few, 50, unit), (many, 72, 3 * unit)
    return [
        _case(f"{name}-{tokens}x{n}x{k}", tokens, n, k, scheme, bias=tokens == few, add=tokens == few)
        for tokens, n, k in shapes
    ]


CASES = [
    *(
        _case(f"{format}-{tokens}x{n}x{k}", tokens, n, k, format)
        for format in ("float32", "float16", "bfloat16")
        for tokens, n, k in ((1, 1, 1), (1, 16, 2), (1, 37, 33), (2, 48, 64), (7, 100, 31), (13, 33, 528))
    ),
    *(case for index, item in enumerate(SCHEMES.items()) for case in _scheme_cases(index, *item)),
    *(  # other numbers of columns, in other orders
        _case(name, *shape, **options)
        for name, shape, options in (
            ("q8-g32-1x48x96", (1, 48, 96, q8(32)), {}),
            ("q8-g64-4x100x896", (4, 100, 896, q8(64)), {"bias": True}),
            ("q8-g128-13x48x2176", (13, 48, 2176, q8(128)), {}),
            ("q8-g128-130x130x384", (130, 130, 384, q8(128)), {"bias": True, "add": True}),
            ("q8-g16-1x50x48", (1, 50, 48, q8(16)), {}),
            ("q8-g16-11x50x48", (11, 50, 48, q8(16)), {"add": True}),
            ("q4-g32-1x71x896", (1, 71, 896, q4(32)), {"bias": True}),
            ("q4-g32-40x136x2208", (40, 136, 2208, q4(32)), {"add": True}),
            ("q4-k-1x35x2560", (1, 35, 2560, SCHEMES["q4-k"]), {}),
            ("q6-k-33x40x2560", (33, 40, 2560, SCHEMES["q6-k"]), {}),
            *(
                (
                    f"q4-g128-zeros-shuffled-{tokens}",
                    (tokens, 40, 384, SCHEMES["q4-g128-zeros"]),
                    {"shuffled": True, "bias": True},
                )
                for tokens in (1, 3, 17)
            ),
        )
    ),
    *(
        _case(f"{format}-bias-add-{tokens}", tokens, 50, 64, format, bias=True, add=True)
        for format in ("float32", "float16", "bfloat16")
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
        _case(f"{name}-{what}", tokens, n, 2048, format, benchmark=True)
        for name, format in (("bfloat16", "bfloat16"), ("q8", q8(64)), ("q4", q4(32)))
        for what, tokens, n in (("decode", 1, 8192), ("prefill", 128, 2048))
    ),
]
