"""Where codes lie: the formula of `Plane` bit by bit, and laying out as its inverse."""

from __future__ import annotations

import numpy as np
import pytest

from kuiperllm.errors import ShapeError
from kuiperllm.quant import CodeLayout, Codes, Plane
from kuiperllm.quant.codes import BYTES, INT8, NIBBLES, dense_layout
from kuiperllm.quant.ggml import formats
from kuiperllm.quant.scheme import Scheme
from kuiperllm.quant.synthetic import random_tensor

LAYOUTS = {
    "bytes": BYTES,
    "int8": INT8,
    "nibbles": NIBBLES,
    **{f"{bits} bits": dense_layout(bits) for bits in (2, 3, 5, 6)},
    "runs": CodeLayout(64, 60, (Plane(1, 4, 8), Plane(40, 1, 4), Plane(49, 1, 2))),
    "gaps": CodeLayout(8, 13, (Plane(5, 8),), flip=0x80),
    "Q5_0": CodeLayout(32, 22, (Plane(6, 4, 16), Plane(2, 1))),
    "Q6_K": CodeLayout(256, 210, (Plane(0, 4, 64), Plane(128, 2, 32))),
}


def code_at(row, layout, column):
    """A code, found bit by bit as the docstring of `Plane` says."""
    block, c = divmod(column, layout.block_size)
    code = shift = 0
    for plane in layout.planes:
        span = plane.run * 8 // plane.bits
        byte = row[block * layout.block_bytes + plane.offset + c // span * plane.run + c % plane.run]
        low = c % span // plane.run * plane.bits
        for bit in range(plane.bits):
            code |= (int(byte) >> low + bit & 1) << shift + bit
        shift += plane.bits
    return code ^ layout.flip


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_bit_by_bit(name):
    layout = LAYOUTS[name]
    columns = 2 * layout.block_size
    data = np.random.default_rng(0).integers(0, 256, (3, layout.row_bytes(columns)), np.uint8)
    codes = Codes(data, layout, columns)
    expected = [[code_at(row, layout, c) for c in range(columns)] for row in data]
    assert codes.unpack().tolist() == expected
    assert codes[1:].unpack().tolist() == expected[1:]
    assert codes[np.array([2, 0])].unpack().tolist() == [expected[2], expected[0]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_laying_out_is_the_inverse(name):
    layout = LAYOUTS[name]
    columns = 3 * layout.block_size
    codes = np.random.default_rng(1).integers(0, 1 << layout.bits, (5, columns)).astype(np.uint8)
    packed = Codes.packed(codes, layout)
    assert packed.layout == layout
    assert (packed.unpack() == codes).all()


def test_layout_of_rows_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"codes of 64 columns take 32 bytes a row, not uint8 \[2, 31\]"):
        Codes(np.zeros((2, 31), np.uint8), NIBBLES, 64)


@pytest.mark.parametrize("kind", [f.name for f in formats().values() if isinstance(f.kind, Scheme)])
def test_random_tensors_fit_into_gguf(kind):
    """So their scales are such as the type with this scheme can hold."""
    (block_format,) = (f for f in formats().values() if f.name == kind)
    tensor = random_tensor(np.random.default_rng(2), block_format.kind, 9, 1024)
    again = block_format.unpack(block_format.pack(tensor).reshape(-1), (9, 1024))
    assert again.dequantize().tobytes() == tensor.dequantize().tobytes()
