"""Weights on the CPU: packing codes wherever files have them, rounding floats to codes, what x becomes."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kuiperllm.core import DType, Tensor
from kuiperllm.errors import CheckpointError, UnsupportedError
from kuiperllm.ops.embedding import embedding
from kuiperllm.ops.linear import LinearWeight, linear, round_to_groups
from kuiperllm.ops.linear.cpu import rounding
from kuiperllm.quant import CodeLayout, Plane, QuantTensor, Scheme, q4, q8
from kuiperllm.quant.codes import BYTES, INT8, NIBBLES
from kuiperllm.quant.ggml import formats
from kuiperllm.quant.rounding import quantize
from kuiperllm.quant.synthetic import random_tensor

GGML = [known for known in formats().values() if isinstance(known.kind, Scheme)]
LAYOUTS = {
    "bytes for 4 bits": (4, BYTES),
    "nibbles": (4, NIBBLES),
    "int8": (8, INT8),
    "halves of 64 bytes, with gaps": (4, CodeLayout(128, 80, (Plane(8, 4, 64),))),
    "2 + 1 bits, neighbours": (3, CodeLayout(32, 12, (Plane(0, 2), Plane(8, 1)))),
    "2 bits after each other": (2, CodeLayout(32, 8, (Plane(0, 2, 8),))),
    "1 + 1 + 4 bits": (6, CodeLayout(64, 48, (Plane(0, 1, 8), Plane(8, 1), Plane(16, 4, 32)))),
    "neighbours four bytes apart": (4, CodeLayout(8, 4, (Plane(0, 4, 4),))),
}


def unpacked(weight: LinearWeight) -> NDArray[np.float32]:
    """The matrix that a weight holds, by looking up all of its rows."""
    ids = Tensor.from_numpy(np.arange(weight.out_features, dtype=np.int32))
    return embedding(ids, weight).numpy()


@pytest.mark.parametrize(("bits", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_codes_are_packed_from_any_layout(bits: int, layout: CodeLayout) -> None:
    stored = random_tensor(np.random.default_rng(bits), Scheme(bits, 32), 35, 256)
    data = np.random.default_rng(0).integers(0, 256, (35, layout.row_bytes(256)), np.uint8)
    if layout is BYTES:
        data &= 0x0F
    codes = type(stored.codes)(data, layout, 256)
    tensor = QuantTensor(stored.scheme, codes, stored.scales)
    np.testing.assert_array_equal(unpacked(LinearWeight.pack(tensor)), tensor.dequantize())


@pytest.mark.parametrize("known", GGML, ids=[known.name for known in GGML])
def test_blocks_of_gguf_files(known: Any) -> None:
    raw = known.pack(random_tensor(np.random.default_rng(5), known.kind, 50, 512))
    tensor = known.unpack(raw.reshape(-1), (50, 512))
    np.testing.assert_array_equal(unpacked(LinearWeight.pack(tensor)), tensor.dequantize())


SUPER_BLOCKS = [
    Scheme(2, 16, DType.int8, "minimum"),
    Scheme(3, 16, DType.int8),
    Scheme(4, 32, DType.int8, "minimum"),
    Scheme(4, 16, DType.int8, "minimum"),
    Scheme(4, 64, DType.int8, "minimum"),
    Scheme(5, 32, DType.int8, "minimum"),
    Scheme(6, 16, DType.int8),
    Scheme(8, 32, DType.int8),
]


def any_multipliers(scheme: Scheme, rows: int, columns: int) -> QuantTensor:
    """A matrix with super-blocks in which every multiplier that the scheme has occurs."""
    rng = np.random.default_rng(8)
    tensor = random_tensor(rng, scheme, rows, columns)
    (least, most), shape = scheme.multipliers, tensor.scales.shape
    scales = rng.integers(least, most + 1, shape).astype(np.int8)
    zeros = None if tensor.zeros is None else rng.integers(0, most + 1, shape).astype(np.int8)
    return dataclasses.replace(tensor, scales=scales, zeros=zeros)


@pytest.mark.parametrize("scheme", SUPER_BLOCKS, ids=lambda s: f"{s}, {s.coding}")
def test_multipliers_of_super_blocks_keep_all_their_bits(scheme: Scheme) -> None:
    tensor = any_multipliers(scheme, 150, 512)
    weight = LinearWeight.empty(scheme, 118, 512)
    weight.write_rows(80, tensor[112:150])
    weight.write_rows(0, tensor[0:80])
    expected = np.concatenate([tensor[0:80].dequantize(), tensor[112:150].dequantize()])
    np.testing.assert_array_equal(unpacked(weight), expected)


@pytest.mark.parametrize("scheme", SUPER_BLOCKS, ids=lambda s: f"{s}, {s.coding}")
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_products_of_super_blocks(scheme: Scheme, tokens: int) -> None:
    """Sums of x meet the minimums of their own groups: an order of groups that is not theirs shows here."""
    tensor = any_multipliers(scheme, 40, 768)
    x = np.random.default_rng(9).uniform(-1, 1, (tokens, 768)).astype(np.float32)
    x *= np.repeat(np.random.default_rng(10).uniform(0, 1, (1, 48)), 16, axis=1).astype(np.float32)
    given = rounding(scheme, tokens, 768)
    assert given is not None
    rounded = round_to_groups(x, given) if isinstance(given, int) else x.astype(ml_dtypes.bfloat16)
    w = tensor.dequantize().astype(np.float64)
    y = linear(Tensor.from_numpy(x), LinearWeight.pack(tensor)).numpy()
    reach = np.abs(rounded.astype(np.float64)) @ np.abs(w).T
    tolerance = 1e-5 if isinstance(given, int) else 1e-2  # codes are expanded to bfloat16 as well
    assert (np.abs(y - rounded.astype(np.float64) @ w.T) <= tolerance * reach).all()


def test_blocks_take_no_more_memory_than_in_a_file() -> None:
    for known in GGML:
        scheme = known.kind
        if scheme.bits != 3:  # Q3_K's multipliers have 6 bits there, 8 here
            raw = known.pack(random_tensor(np.random.default_rng(5), scheme, 32, 512))
            assert LinearWeight.empty(scheme, 32, 512).nbytes == raw.nbytes


SHORT = [
    (q4(32), 96),
    (q8(32), 32),
    (q8(64), 192),
    (q8(128), 128),
    (Scheme(4, 16, coding="zeros"), 96),
    (Scheme(5, 32, coding="minimum"), 96),
    (Scheme(8, 96, coding="e4m3"), 288),
    (Scheme(8, 32, DType.float32), 96),
]


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize(("scheme", "k"), SHORT, ids=lambda value: str(value))
def test_columns_that_do_not_fill_pieces(scheme: Scheme, k: int, tokens: int) -> None:
    """The last piece of a block has fewer groups than the others, or is the only one."""
    tensor = random_tensor(np.random.default_rng(11), scheme, 56, k)
    weight = LinearWeight.empty(scheme, 40, k)
    weight.write_rows(32, tensor[48:56])
    weight.write_rows(0, tensor[0:32])
    w = np.concatenate([tensor[0:32].dequantize(), tensor[48:56].dequantize()])
    np.testing.assert_array_equal(unpacked(weight), w)
    x = np.random.default_rng(12).standard_normal((tokens, k), np.float32)
    given = rounding(scheme, tokens, k)
    rounded = round_to_groups(x, given) if isinstance(given, int) else x.astype(np.float64)
    y = linear(Tensor.from_numpy(x), weight).numpy()
    reach = np.abs(rounded) @ np.abs(w).T.astype(np.float64)
    tolerance = 1e-2 if given is DType.bfloat16 else 1e-5
    assert (np.abs(y - rounded @ w.T.astype(np.float64)) <= tolerance * reach).all()


def test_rows_in_pieces_and_rows_of_a_larger_matrix() -> None:
    tensor = random_tensor(np.random.default_rng(1), q4(32), 150, 160)
    weight = LinearWeight.empty(tensor.scheme, 102, 160)
    weight.write_rows(64, tensor[112:150])
    weight.write_rows(0, tensor[0:64])
    expected = np.concatenate([tensor[0:64].dequantize(), tensor[112:150].dequantize()])
    np.testing.assert_array_equal(unpacked(weight), expected)


@pytest.mark.parametrize("scheme", [q8(32), q8(64), q8(16), q4(32), q4(128)], ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_are_rounded_as_on_the_host(scheme: Scheme, kind: Any) -> None:
    rng = np.random.default_rng(2)
    sizes = 10.0 ** rng.integers(-8, 4, (37, 3))  # scales that float16 rounds coarsely, or to nothing
    w = (rng.standard_normal((37, 3, 128)) * sizes[:, :, None]).reshape(37, 384).astype(kind)
    w[3, :128] = 0
    w[4, 128:256] = np.abs(w[4, 128:256])
    weight = LinearWeight.empty(scheme, 37, 384)
    weight.write_rows(0, w)
    np.testing.assert_array_equal(unpacked(weight), quantize(w, scheme).dequantize())


@pytest.mark.parametrize("scheme", [q8(32), q4(32)], ids=str)
def test_floats_that_cannot_be_rounded(scheme: Scheme) -> None:
    weight = LinearWeight.empty(scheme, 16, 64)
    w = np.ones((16, 64), np.float32)
    w[7, 40] = np.inf
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        weight.write_rows(0, w)
    w[7, 40] = -1e9
    with pytest.raises(UnsupportedError, match="too large"):
        weight.write_rows(0, w)


def test_x_in_groups_loses_little_where_one_element_is_large() -> None:
    """Each group has a scale of its own, which keeps what stands in other groups than the outlier."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 256)).astype(np.float32)
    x[:, 5] = 200
    error = np.abs(round_to_groups(x, 32) - x)
    assert error[:, :32].max() <= 200 / 127 / 2 * 1.001
    assert error[:, 32:].max() < 4 / 127 / 2 * 1.2
    zero = np.zeros((1, 64), np.float32)
    np.testing.assert_array_equal(round_to_groups(zero, 32), zero)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_number_that_is_not_finite_is_not_rounded_away(tokens: int) -> None:
    weight = LinearWeight.pack(random_tensor(np.random.default_rng(4), q4(32), 20, 64))
    x = np.ones((tokens, 64), np.float32)
    x[-1, 9] = np.nan
    y = linear(Tensor.from_numpy(x), weight).numpy()
    assert np.isnan(y[-1]).all()
    assert np.isfinite(y[:-1]).all()


WIDE = {
    "groups that 128 does not divide": (Scheme(4, 96), 1152, 96),
    "groups wider than a panel": (q8(1536), 3072, 1536),
    "columns that 128 does not divide": (q4(32), 2144, 32),
    "a last panel of less than a piece": (q8(64), 1088, 64),
    "a last panel of one super-block": (Scheme(4, 32, DType.int8, "minimum"), 2304, 256),
}


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(("scheme", "k", "x_group"), WIDE.values(), ids=WIDE)
def test_several_panels(scheme: Scheme, k: int, x_group: int, tokens: int) -> None:
    tensor = random_tensor(np.random.default_rng(8), scheme, 40, k)
    x = np.random.default_rng(9).standard_normal((tokens, k), np.float32)
    y = linear(Tensor.from_numpy(x), LinearWeight.pack(tensor)).numpy()
    if rounding(scheme, tokens, k) is DType.bfloat16:
        rounded = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    else:
        assert rounding(scheme, tokens, k) == x_group
        rounded = round_to_groups(x, x_group)
    expected = rounded @ tensor.dequantize().T.astype(np.float64)
    tolerance = 1e-2 if rounding(scheme, tokens, k) is DType.bfloat16 else 1e-5
    np.testing.assert_allclose(y, expected, atol=tolerance * np.abs(expected).max())


def test_columns_in_another_order_of_a_slice_of_x() -> None:
    tensor = random_tensor(
        np.random.default_rng(6), Scheme(8, 32, DType.float32, "e4m3"), 24, 64, shuffled=True
    )
    wide = np.random.default_rng(7).standard_normal((3, 100), np.float32)
    x = Tensor.from_numpy(wide)[:, 20:84]
    for rows in (x[:1], x):
        y = linear(rows, LinearWeight.pack(tensor)).numpy()
        expected = wide[: rows.shape[0], 20:84].astype(np.float64) @ tensor.dequantize().T.astype(np.float64)
        np.testing.assert_allclose(y, expected, atol=0.02)
