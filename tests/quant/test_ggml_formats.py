"""GGUF tensor types against the `gguf` package, which restates ggml's reference code."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from kuiperllm.core.dtype import DType
from kuiperllm.errors import DTypeError, ShapeError, UnsupportedError
from kuiperllm.quant import Codes, QuantTensor, Scheme, q8
from kuiperllm.quant.codes import BYTES
from kuiperllm.quant.ggml import find_format, formats

QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
PLAIN = ["F32", "F16", "BF16"]
# Numbers that a float16 scale may be: zeros, the smallest and largest, infinities, NaN.
EDGES = np.array([0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504, -65504, 1, np.inf, -np.inf, np.nan], np.float16)


def of_name(name):
    return find_format(gguf.GGMLQuantizationType[name].value, "t")


def random_blocks(block_format, rows, columns, seed=0):
    """Bytes of every kind, which every block may hold."""
    shape = rows, columns // block_format.block_size * block_format.block_bytes
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def unpack(block_format, raw, columns):
    return block_format.unpack(np.ascontiguousarray(raw).reshape(-1), (len(raw), columns))


def assert_as_gguf(block_format, raw, columns):
    with np.errstate(all="ignore"):
        ours = unpack(block_format, raw, columns).dequantize()
        theirs = dequantize(raw, gguf.GGMLQuantizationType[block_format.name])
    assert ours.shape == theirs.shape == (len(raw), columns)
    nan = np.isnan(theirs)
    assert (np.isnan(ours) == nan).all()
    assert ours[~nan].tobytes() == theirs[~nan].tobytes()
    return nan


def test_table_agrees_with_gguf():
    assert {f.name for f in formats().values()} == {*PLAIN, *QUANTIZED}
    for number, block_format in formats().items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == block_format.name
        assert gguf.GGML_QUANT_SIZES[kind] == (block_format.block_size, block_format.block_bytes)


@pytest.mark.parametrize("name", QUANTIZED)
def test_random_blocks_are_dequantized_as_gguf_does_bit_for_bit(name):
    block_format = of_name(name)
    raw = random_blocks(block_format, 70, 4096)
    nan = assert_as_gguf(block_format, raw, 4096)
    assert not nan.all()


# Where the float16 numbers of a block lie, from the block structs of ggml-common.h.
HALVES = {
    **dict.fromkeys(["Q4_0", "Q5_0", "Q8_0"], (0,)),
    **dict.fromkeys(["Q4_1", "Q5_1", "Q4_K", "Q5_K"], (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_edges_of_scales(name):
    """Every pair of edges as scale and minimum, beside random codes and codes that are all 0 or all 1."""
    block_format, offsets = of_name(name), HALVES[name]
    pairs = [(scale, minimum) for scale in EDGES for minimum in EDGES]
    raw = random_blocks(block_format, 3 * len(pairs), block_format.block_size)
    raw[len(pairs) :] = 0
    raw[2 * len(pairs) :] = 255
    for row, numbers in zip(raw, pairs * 3, strict=True):
        for offset, number in zip(offsets, numbers, strict=False):
            row[offset : offset + 2] = np.array([number]).view(np.uint8)
    nan = assert_as_gguf(block_format, raw, block_format.block_size)
    assert nan.any()
    assert (~nan).any()


@pytest.mark.parametrize("name", QUANTIZED)
def test_each_byte_of_a_block_alone(name):
    """A block with a single byte that is not 0, in all places and of all values: no two fields overlap."""
    block_format = of_name(name)
    size = block_format.block_bytes
    raw = np.zeros((size, 256, size), np.uint8)
    raw[np.arange(size), :, np.arange(size)] = np.arange(256)
    raw[:, :, HALVES[name][0] + 1] |= 0x3C  # scales near 1, or nothing would show
    assert_as_gguf(block_format, raw.reshape(size * 256, size), block_format.block_size)


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_are_views_and_the_rest_is_small(name):
    block_format = of_name(name)
    raw = random_blocks(block_format, 4, 1024)
    weight = unpack(block_format, raw, 1024)
    assert np.shares_memory(weight.codes.data, raw)
    assert weight.scheme == block_format.kind
    # Scales of 4 or 6 bits take a byte each; what is added never exceeds 4 bits per column.
    assert raw.nbytes <= weight.nbytes <= raw.nbytes + 4 * 4 * 1024 // 16


@pytest.mark.parametrize("name", QUANTIZED)
def test_pack_gives_the_bytes_back(name):
    block_format = of_name(name)
    raw = random_blocks(block_format, 33, 2048)
    weight = unpack(block_format, raw, 2048)
    assert block_format.pack(weight).tobytes() == raw.tobytes()
    # Wherever the codes lie.
    of_bytes = QuantTensor(
        weight.scheme,
        Codes(weight.codes.unpack(), BYTES, 2048),
        weight.scales,
        weight.zeros,
        weight.super_scales,
        weight.super_zeros,
    )
    assert block_format.pack(of_bytes).tobytes() == raw.tobytes()


def test_pack_refuses_what_the_type_cannot_hold():
    q4_0, weight = of_name("Q4_0"), unpack(of_name("Q8_0"), random_blocks(of_name("Q8_0"), 2, 64), 64)
    with pytest.raises(DTypeError, match="Q4_0 holds q4, groups of 32, not q8, groups of 32"):
        q4_0.pack(weight)
    with pytest.raises(DTypeError, match="Q4_0 holds q4, groups of 32, not float32"):
        q4_0.pack(np.ones((2, 32), np.float32))
    with pytest.raises(DTypeError, match="F16 holds float16, not float32"):
        of_name("F16").pack(np.ones((2, 32), np.float32))
    shuffled = QuantTensor(
        weight.scheme, weight.codes, weight.scales, columns=np.arange(64, dtype=np.int32)[::-1].copy()
    )
    with pytest.raises(ShapeError, match="columns in another order"):
        of_name("Q8_0").pack(shuffled)


@pytest.mark.parametrize("name", [*PLAIN, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_gguf_quantizes_is_read_back(name):
    kind = gguf.GGMLQuantizationType[name]
    w = np.random.default_rng(0).normal(0, 1, (5, 96)).astype(np.float32)
    raw = quantize(w, kind)
    ours = unpack(of_name(name), np.ascontiguousarray(raw).view(np.uint8).reshape(5, -1), 96)
    assert of_name(name).pack(ours).tobytes() == raw.tobytes()
    ours = ours.dequantize() if isinstance(ours, QuantTensor) else ours.astype(np.float32)
    assert ours.tobytes() == dequantize(raw, kind).astype(np.float32).tobytes()


def test_plain_types_are_views():
    raw = np.zeros(64, np.uint8)
    assert np.shares_memory(find_format(0, "t").unpack(raw, (2, 8)), raw)
    assert np.shares_memory(find_format(30, "t").unpack(raw, (4, 8)), raw)


@pytest.mark.parametrize("name", QUANTIZED)
def test_vectors_are_refused(name):
    block_format = of_name(name)
    with pytest.raises(UnsupportedError, match=f"{name} is supported for matrices"):
        block_format.unpack(np.zeros(block_format.block_bytes, np.uint8), (block_format.block_size,))


@pytest.mark.parametrize(("number", "name"), [(16, "IQ2_XXS"), (39, "MXFP4"), (99, "unknown")])
def test_unknown_type_is_named_and_the_known_ones_listed(number, name):
    with pytest.raises(
        UnsupportedError, match=rf"x\.gguf: t has the type {name} \(number {number}\)"
    ) as caught:
        find_format(number, "x.gguf: t")
    assert "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BF16" in str(caught.value)


def test_kinds_state_what_is_unpacked():
    assert of_name("Q8_0").kind == q8(32)
    assert of_name("BF16").kind is DType.bfloat16


@pytest.mark.parametrize("group_size", [128, 256])
def test_minimums_of_super_blocks_come_in_fours(group_size: int) -> None:
    with pytest.raises(UnsupportedError, match="no such way of quantizing"):
        Scheme(4, group_size, DType.int8, "minimum")
    assert Scheme(6, group_size, DType.int8).has_super_blocks
