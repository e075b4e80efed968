"""How CPU kernels read packed codes and what belongs to groups: the layout of a quantized matrix.

A block is 16 rows of W side by side. For every 32 columns of a block (a chunk) it holds the planes of the
codes one after the other, low bits first. A quad is what one int8 dot product takes: four columns of the 16
rows, a byte for each code, row by row. With quads 0 to 7 of a chunk, vectors of 64 bytes hold

    8 bits    one quad each
    4 bits    quads 2v and 2v + 1, at bits 0 and 4 of each byte
    2 bits    quads 4v to 4v + 3, at bits 0, 2, 4, 6
    1 bit     quads 0 to 7, at bits 0 to 7

and 3, 5 and 6 bits are planes of 2 + 1, 4 + 1 and 4 + 2 bits. Groups have records of 16 scales, one for each
row, or of 16 scales and 16 zero points or minimums: [N/16][K/GROUP][1|2][16]; super-blocks likewise.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    and_i32,
    as_f32,
    as_f32p,
    as_i8p,
    as_u16p,
    load,
    load_f16,
    load_i8,
    load_i32,
    mul,
    or_i32,
    pair_bf16,
    shl,
    shr,
    splat,
    splat_i32,
    store,
    store_i32,
    sub,
    to_f32,
    unsigned_byte,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline, registers, unroll

# Template parameters: the scheme.
BITS = 8
GROUP = 64  # columns that share a scale
SCALE = 0  # HALF, FLOAT, or BYTE: int8, with a float16 number for each super-block
CODING = 0  # MIDDLE, ZEROS, MINIMUM or E4M3

# Template parameter: whether codes are expanded to pairs of bfloat16, else to float32.
PAIRS = False

HALF, FLOAT, BYTE = 0, 1, 2
MIDDLE, ZEROS, MINIMUM, E4M3 = 0, 1, 2, 3
SUPER = 256  # columns of a super-block


@inline
def quad(w, chunk, q):
    """Quad q of the chunk that begins at byte `chunk` of w."""
    if BITS == 8:
        return load_i32(w, chunk + q * 64)
    if BITS >= 4:
        codes = bits_of_plane(w, chunk + q // 2 * 64, q % 2 * 4, 0x0F0F0F0F, 0)
        if BITS == 5:
            codes = or_i32(codes, bits_of_plane(w, chunk + 256, q, 0x01010101, 4))
        if BITS == 6:
            codes = or_i32(codes, bits_of_plane(w, chunk + 256 + q // 4 * 64, q % 4 * 2, 0x03030303, 4))
        return codes
    codes = bits_of_plane(w, chunk + q // 4 * 64, q % 4 * 2, 0x03030303, 0)
    if BITS == 3:
        codes = or_i32(codes, bits_of_plane(w, chunk + 128, q, 0x01010101, 2))
    return codes


@inline
def bits_of_plane(w, at, low, mask, to):
    """The bits of a vector from bit `low` of each byte on, moved to bit `to`."""
    bits = and_i32(shr(load_i32(w, at), np.int32(low)), splat_i32(np.int32(mask)))
    return shl(bits, np.int32(to))


@inline
def load_number(numbers, index):
    """16 scales, zero points or minimums as they are stored; of int8, the multipliers."""
    if SCALE == HALF:
        return load_f16(as_u16p(numbers), index)
    if SCALE == FLOAT:
        return load(as_f32p(numbers), index)
    return to_f32(load_i8(as_i8p(numbers), index))


@inline
def pair_of_minimums(scales, at):
    """The minimums of the group whose record begins at `at` and of the next one, as pairs of int16."""
    low = and_i32(load_i8(as_i8p(scales), at + 16), splat_i32(np.int32(0xFFFF)))
    return or_i32(low, shl(load_i8(as_i8p(scales), at + 48), np.int32(16)))


@inline
def load_super(supers, block, group, k, second):
    """Scales of the scales of a group's super-block, or with `second` = 16 of what is beside them."""
    record = 16 if CODING == MIDDLE else 32
    return load_f16(as_u16p(supers), (block * (k // SUPER) + group * GROUP // SUPER) * record + second)


@inline
def load_scaled(numbers, supers, block, group, k, second):
    """Scales of a group of a block of k columns, or with `second` = 16 what is beside them, in float32."""
    record = 32 if CODING == ZEROS or CODING == MINIMUM else 16
    number = load_number(numbers, (block * (k // GROUP) + group) * record + second)
    if SCALE == BYTE:
        number = mul(number, load_super(supers, block, group, k, second))
    return number


# --- floating point ---------------------------------------------------------------------------------------


@inline
def number_of(codes, column):
    """What byte `column` of each lane stands for, before it is scaled."""
    if CODING == E4M3:
        # Exponent and mantissa, moved to where float32 has them, and 2**120 times too small.
        bits = shr(shl(codes, np.int32(24 - 8 * column)), np.int32(4))
        magnitude = and_i32(bits, splat_i32(np.int32(0x07F00000)))
        sign = and_i32(shl(codes, np.int32(24 - 8 * column)), splat_i32(np.int32(-0x80000000)))
        return mul(as_f32(or_i32(sign, magnitude)), splat(np.float32(2.0**120)))
    return to_f32(unsigned_byte(codes, np.int32(8 * column)))


@inline
def weight_of(number, scale, zero):
    """The weight, rounded as `QuantTensor.dequantize` does."""
    if CODING == E4M3:
        return mul(number, scale)
    if CODING == MINIMUM:
        return sub(mul(number, scale), zero)
    return mul(sub(number, zero), scale)


@inline
def expand_weights(w, scales, supers, panel, block, k, first, after):
    """Columns `first` to `after` of a block: float32 [columns][16], or bfloat16 [columns/2][16][2].

    `panel` points to such elements; `first` and `after` are multiples of 32.
    """
    weight = registers(4)
    for column in range(first, after, 32):
        for half in range(2 if GROUP == 16 else 1):
            group = column // GROUP + half
            scale, zero = load_scaled(scales, supers, block, group, k, 0), zeros()
            if CODING == MIDDLE:
                zero = splat(np.float32(1 << (BITS - 1)))
            if CODING == ZEROS or CODING == MINIMUM:
                zero = load_scaled(scales, supers, block, group, k, 16)
            for q in range(4 if GROUP == 16 else 8):
                codes = quad(w, (block * k + column) * BITS * 2, half * 4 + q)
                for c in unroll(4):
                    weight[c] = weight_of(number_of(codes, c), scale, zero)
                to = (column - first + half * 16 + q * 4) * 16
                if PAIRS:
                    store_i32(panel, to, pair_bf16(weight[0], weight[1]))
                    store_i32(panel, to + 32, pair_bf16(weight[2], weight[3]))
                else:
                    for c in unroll(4):
                        store(panel, to + c * 16, weight[c])
