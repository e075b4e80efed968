"""GGUF tensor types against the `gguf` package, which restates ggml's reference code."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from kuiperllm.errors import UnsupportedError
from kuiperllm.quant import QuantTensor
from kuiperllm.quant.ggml import find_format, formats


def test_table_agrees_with_gguf():
    assert {f.name for f in formats().values()} == {"F32", "F16", "BF16", "Q8_0"}
    for number, block_format in formats().items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == block_format.name
        assert gguf.GGML_QUANT_SIZES[kind] == (block_format.block_size, block_format.block_bytes)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_values_equal_those_of_gguf_bit_for_bit(kind):
    kind = gguf.GGMLQuantizationType[kind]
    w = np.random.default_rng(0).normal(0, 1, (5, 96)).astype(np.float32)
    raw = quantize(w, kind)
    ours = find_format(kind.value, "t").unpack(np.ascontiguousarray(raw).view(np.uint8).reshape(-1), w.shape)
    ours = ours.dequantize() if isinstance(ours, QuantTensor) else ours.astype(np.float32)
    theirs = dequantize(raw, kind)
    assert ours.shape == theirs.shape == w.shape
    assert ours.tobytes() == theirs.astype(np.float32).tobytes()


def test_plain_types_are_views():
    raw = np.zeros(64, np.uint8)
    assert np.shares_memory(find_format(0, "t").unpack(raw, (2, 8)), raw)
    assert np.shares_memory(find_format(30, "t").unpack(raw, (4, 8)), raw)


def test_q8_0_vector_is_refused():
    with pytest.raises(UnsupportedError, match="matrices"):
        find_format(8, "t").unpack(np.zeros(34, np.uint8), (32,))


@pytest.mark.parametrize(("number", "name"), [(12, "Q4_K"), (2, "Q4_0"), (99, "unknown")])
def test_unknown_type_is_named_and_the_known_ones_listed(number, name):
    with pytest.raises(
        UnsupportedError, match=rf"x\.gguf: t has the type {name} \(number {number}\)"
    ) as caught:
        find_format(number, "x.gguf: t")
    assert "F32, F16, Q8_0, BF16" in str(caught.value)
