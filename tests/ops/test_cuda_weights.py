"""How CUDA lays out weights: rows as they are, converted or rounded on the device; and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plain_layout import parts

from kuiperllm.core import Device, DType
from kuiperllm.errors import CheckpointError, UnsupportedError
from kuiperllm.ops.linear import LinearWeight, cuda_weights
from kuiperllm.quant import (
    CodeLayout,
    Codes,
    Plane,
    QuantTensor,
    Scheme,
    int8_tensor,
    q4,
    q8,
    quantize,
    quantize_q8,
)
from kuiperllm.quant.codes import BYTES
from kuiperllm.quant.scheme import Coding
from kuiperllm.quant.synthetic import random_tensor

CODINGS: tuple[Coding, ...] = ("middle", "zeros", "minimum")
FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
rng = np.random.default_rng(5)


def normal(rows: int, columns: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return rng.standard_normal((rows, columns), np.float32).astype(dtype)


def packed(weight: LinearWeight) -> np.ndarray[Any, Any]:
    """Floating-point rows as they lie in memory, padding included."""
    assert isinstance(weight.format, DType)
    return weight.data.numpy().reshape(weight.out_features, -1).view(weight.format.numpy)


def assert_holds(weight: LinearWeight, expected: QuantTensor) -> None:
    codes, records, of_super = parts(expected)
    np.testing.assert_array_equal(weight.data.numpy(), codes)
    for found, wanted in ((weight.scales, records), (weight.super_scales, of_super)):
        if found is None or wanted is None:
            assert found is wanted
            continue
        assert found.dtype.numpy == wanted.dtype
        assert found.nbytes % 16 == 0  # vectors are loaded
        np.testing.assert_array_equal(found.numpy()[: wanted.size], wanted)


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("format", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("columns", [64, 51, 1])
def test_floats_are_converted_and_rows_padded_with_zeros(
    stored: Any, format: str, columns: int, cuda: Device
) -> None:
    rows = normal(19, columns, stored)
    weight = LinearWeight.empty(DType(format), 19, columns, device=cuda)
    weight.data.buffer.fill(0xFF)
    weight.write_rows(0, rows)
    found = packed(weight)
    assert found.strides[0] % 16 == 0
    assert found.strides[0] - columns * found.itemsize < 16
    np.testing.assert_array_equal(found[:, :columns], rows.astype(found.dtype))
    assert not found[:, columns:].astype(np.float32).any()


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize(("columns", "group"), [(128, 32), (128, 64), (256, 128), (48, 16)])
def test_floats_are_rounded_as_quantize_q8_does(stored: Any, columns: int, group: int, cuda: Device) -> None:
    rows = normal(37, columns, stored)
    rows[3] = 0
    rows[4] *= stored(2.0**-15)  # scales among the subnormal numbers of float16
    rows[5] *= stored(2.0**-22)
    rows[6] *= stored(1000.0)
    rows[7] = stored(255 * 2.0**-24)  # 127.5 scales of 2 ** -23, which would round to 128
    weight = LinearWeight.empty(q8(group), 37, columns, device=cuda)
    weight.write_rows(0, rows)
    assert_holds(weight, quantize_q8(rows, group))


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (4, 16), (2, 32), (6, 64)])
def test_floats_are_rounded_as_quantize_does(stored: Any, bits: int, group: int, cuda: Device) -> None:
    rows = normal(37, 256, stored)
    rows[3] = 0
    rows[4] *= stored(2.0**-12)
    rows[5] *= stored(2.0**-20)
    rows[6] = -abs(rows[6])
    rows[7, ::2] = -rows[7, 1::2]  # the largest comes with both signs
    scheme = Scheme(bits, group)
    weight = LinearWeight.empty(scheme, 37, 256, device=cuda)
    weight.write_rows(0, rows)
    assert_holds(weight, quantize(rows, scheme))


ANY_SCHEME = [
    *(Scheme(bits, 32, DType.float16, coding) for bits in (2, 3, 4, 5, 6, 8) for coding in CODINGS),
    *(Scheme(bits, 16, DType.int8, coding) for bits in (2, 3, 4, 6) for coding in ("middle", "minimum")),
    *(Scheme(bits, 64, DType.float32) for bits in (4, 8)),
    Scheme(8, 128, DType.float32, "e4m3"),
]


@pytest.mark.parametrize("scheme", ANY_SCHEME, ids=repr)
def test_stored_codes_are_laid_out(scheme: Scheme, cuda: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_weights, "_PIECE_BYTES", 2000)
    tensor = random_tensor(np.random.default_rng(0), scheme, 53, 256)
    weight = LinearWeight.empty(scheme, 53, 256, device=cuda)
    weight.write_rows(32, tensor[32:])
    weight.write_rows(0, tensor[:32])
    assert_holds(weight, tensor)


@pytest.mark.parametrize(
    ("bits", "layout"),
    [
        (4, BYTES),
        (4, CodeLayout(32, 18, (Plane(2, 4, 16),))),
        (5, CodeLayout(32, 22, (Plane(6, 4, 16), Plane(2, 1)))),
        (8, CodeLayout(32, 34, (Plane(2, 8),), flip=0x80)),
        (6, CodeLayout(256, 210, (Plane(0, 4, 64), Plane(128, 2, 32)))),
        (3, CodeLayout(256, 110, (Plane(32, 2, 32), Plane(0, 1, 32)))),
        (3, CodeLayout(32, 12, (Plane(8, 1), Plane(0, 2)), flip=4)),
    ],
)
def test_codes_come_in_the_layouts_of_files(bits: int, layout: CodeLayout, cuda: Device) -> None:
    """With other bytes between them, planes in any order, codes in two's complement."""
    scheme = Scheme(bits, 32)
    made = random_tensor(np.random.default_rng(0), scheme, 21, 512)
    stored = replace(made, codes=Codes.packed(made.codes.unpack(), layout))
    weight = LinearWeight.pack(stored, device=cuda)
    assert_holds(weight, made)


@pytest.mark.parametrize("scales", [np.float16, np.float32])
def test_stored_groups_are_kept_as_they_are(scales: Any, cuda: Device) -> None:
    made = quantize_q8(normal(20, 96), 32)
    stored = int8_tensor(made.codes.data.view(np.int8), (made.scales * np.float32(1.01)).astype(scales))
    weight = LinearWeight.empty(stored.scheme, 20, 96, device=cuda)
    weight.write_rows(0, stored[:16])
    weight.write_rows(16, stored[16:])
    assert_holds(weight, stored)


@pytest.mark.parametrize("format", ["float16", "bfloat16", "q8", "q4"])
def test_rows_come_in_pieces_and_from_anywhere(
    format: str, cuda: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that overlap in memory, as random weights do, written in two steps, a few at a time."""
    monkeypatch.setattr(cuda_weights, "_PIECE_BYTES", 1000)
    numbers = rng.standard_normal(1000, np.float32).astype(np.float16)
    rows = np.lib.stride_tricks.as_strided(numbers, (50, 64), (18, 2), writeable=False)
    scheme = {"q8": q8(32), "q4": q4(32)}.get(format)
    weight = LinearWeight.empty(scheme or DType(format), 50, 64, device=cuda)
    weight.write_rows(32, rows[32:])
    weight.write_rows(0, rows[:32])
    if scheme is not None:
        assert_holds(weight, quantize(rows, scheme))
    else:
        np.testing.assert_array_equal(packed(weight), rows.astype(DType(format).numpy))


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize(
    ("bad", "error", "reason"),
    [
        (np.nan, CheckpointError, "a weight is NaN or infinite"),
        (-np.inf, CheckpointError, "a weight is NaN or infinite"),
        (-1e7, UnsupportedError, "a weight is too large"),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    bad: float, error: type[Exception], reason: str, stored: Any, cuda: Device
) -> None:
    if stored is np.float16 and abs(bad) == 1e7:
        pytest.skip("float16 holds nothing that large")
    rows = normal(16, 128, stored)
    rows[9, 100] = stored(bad)
    weight = LinearWeight.empty(q8(64), 16, 128, device=cuda)
    with pytest.raises(error, match=reason):
        weight.write_rows(0, rows)


def test_biases_are_padded_with_zeros(cuda: Device) -> None:
    bias = normal(1, 21)[0]
    weight = LinearWeight.pack(normal(21, 8), bias, device=cuda)
    assert weight.bias is not None
    found = weight.bias.numpy()
    assert len(found) % 16 == 0
    np.testing.assert_array_equal(found[:21], bias)
    assert not found[21:].any()


def test_activations_have_the_type_of_the_weights() -> None:
    for dtype in (DType.float32, DType.float16, DType.bfloat16):
        assert cuda_weights.activation_dtype(dtype) is dtype
    assert cuda_weights.activation_dtype(q8(64)) is DType.bfloat16
