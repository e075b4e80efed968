"""How CPU kernels read packed codes and what belongs to groups: the layout of a quantized matrix.

A block is 16 rows of W side by side. For every 32 columns of a block (a chunk) it holds the planes of the
codes one after the other, low bits first. A quad is what one int8 dot product takes: four columns of the 16
rows, a byte for each code, row by row. With quads 0 to 7 of a chunk, vectors of 64 bytes hold

    8 bits    one quad each
    4 bits    quads 2v and 2v + 1, at bits 0 and 4 of each byte
    2 bits    quads 4v to 4v + 3, at bits 0, 2, 4, 6
    1 bit     quads 0 to 7, at bits 0 to 7

and 3, 5 and 6 bits are planes of 2 + 1, 4 + 1 and 4 + 2 bits.

So that a thread reads a single stream of memory, each PIECE columns of a block begin with RECORDS bytes of
what belongs to their groups, and their codes follow; the last piece of a block may have fewer columns. Groups
have records of 16 scales, one for each row, or of 16 scales and 16 zero points or minimums. A super-block is
a piece: it begins with what its groups are multiplied by, followed by 16 float16 scales of that, and with
minimums by 16 float16 scales of those:

    no minimums                int8 [groups][16]
    minimums and 2-bit codes   for every 4 groups one vector; byte j of a lane: the scale of group j in the
                               low 4 bits, its minimum in the others
    minimums, else             for every 8 groups three vectors, of which byte j of a lane has in its low 6
                               bits the scale of group j, that of group 4 + j, and the minimum of group j;
                               the minimum of group 4 + j is spread over their top bits, the lowest two first
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
    offset,
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

# Template parameters that follow from them.
PIECE = 128  # columns
RECORDS = 64  # bytes of a piece before its codes
STREAM = 528  # bytes of a piece for every 32 columns

# Template parameter: whether codes are expanded to pairs of bfloat16, else to float32.
PAIRS = False

HALF, FLOAT, BYTE = 0, 1, 2
MIDDLE, ZEROS, MINIMUM, E4M3 = 0, 1, 2, 3


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
    return shl(masked(shr(load_i32(w, at), np.int32(low)), mask), np.int32(to))


@inline
def block_at(block, k):
    """Where a block of k columns, a multiple of 32, begins, in bytes."""
    return block * ((k + PIECE - 1) // PIECE * RECORDS + k * BITS * 2)


@inline
def piece_at(column):
    """Where the piece of a column begins in its block, in bytes."""
    return column // PIECE * (RECORDS + PIECE * BITS * 2)


@inline
def chunk_at(column):
    """Where the chunk of a column, a multiple of 32, lies in its block, in bytes."""
    return piece_at(column) + RECORDS + column % PIECE * BITS * 2


@inline
def record_at(group):
    """Where the record of a group lies in its block, in elements; not with super-blocks."""
    size = 4 if SCALE == FLOAT else 2
    record = 32 if CODING == ZEROS or CODING == MINIMUM else 16
    return piece_at(group * GROUP) // size + group % (PIECE // GROUP) * record


@inline
def load_number(block, index):
    """16 scales, zero points or minimums as they are stored, from an element of a block on."""
    if SCALE == HALF:
        return load_f16(as_u16p(block), index)
    return load(as_f32p(block), index)


@inline
def load_scaled(block, group, second):
    """Scales of a group of a block, or with `second` = 16 what is beside them, in float32."""
    if SCALE == BYTE:
        piece, within = offset(block, piece_at(group * GROUP)), group % (PIECE // GROUP)
        if second:
            return mul(to_f32(minimum_of(piece, within)), load_super(piece, second))
        return mul(multiplier_of(piece, within), load_super(piece, second))
    return load_number(block, record_at(group) + second)


# --- super-blocks: what is before the codes of a piece ------------------------------------------------------


@inline
def load_super(piece, second):
    """Scales of the scales of a piece, or with `second` = 16 of its minimums."""
    record = 16 if CODING == MIDDLE else 32
    return load_f16(as_u16p(offset(piece, RECORDS - 2 * record)), second)


@inline
def multiplier_of(piece, g):
    """What the scale of group g is multiplied by, in float32."""
    if CODING == MIDDLE:
        return to_f32(load_i8(as_i8p(piece), g * 16))
    shift = np.int32(g % 4 * 8)
    if BITS == 2:
        return to_f32(masked(shr(load_i32(piece, g // 4 * 64), shift), 0x0F))
    return to_f32(masked(shr(load_i32(piece, g // 8 * 192 + g % 8 // 4 * 64), shift), 0x3F))


@inline
def pair_of_minimums(piece, p):
    """What the minimums of two groups are multiplied by, as pairs of int16.

    Pairs 0 and 1 of every four groups are groups 0 and 2, and 1 and 3: bytes two apart.
    """
    shift = np.int32(p % 2 * 8)
    if BITS == 2:
        return masked(shr(load_i32(piece, p // 2 * 64), shift + np.int32(4)), 0x000F000F)
    first = p // 4 * 192
    minimums = load_i32(piece, first + 128)
    if p % 4 >= 2:
        low = masked(shr(load_i32(piece, first), np.int32(6)), 0x03030303)
        middle = masked(shr(load_i32(piece, first + 64), np.int32(4)), 0x0C0C0C0C)
        minimums = or_i32(or_i32(low, middle), masked(shr(minimums, np.int32(2)), 0x30303030))
    return masked(shr(minimums, shift), 0x003F003F)


@inline
def minimum_of(piece, g):
    """What the minimum of group g is multiplied by."""
    return masked(shr(pair_of_minimums(piece, g // 4 * 2 + g % 2), np.int32(g % 4 // 2 * 16)), 0xFFFF)


@inline
def masked(bits, mask):
    return and_i32(bits, splat_i32(np.int32(mask)))


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
def expand_weights(w, panel, block, k, first, after):
    """Columns `first` to `after` of a block: float32 [columns][16], or bfloat16 [columns/2][16][2].

    `panel` points to such elements; `first` and `after` are multiples of 32.
    """
    weight = registers(4)
    wb = offset(w, block_at(block, k))
    for column in range(first, after, 32):
        for half in range(2 if GROUP == 16 else 1):
            group = column // GROUP + half
            scale, zero = load_scaled(wb, group, 0), zeros()
            if CODING == MIDDLE:
                zero = splat(np.float32(1 << (BITS - 1)))
            if CODING == ZEROS or CODING == MINIMUM:
                zero = load_scaled(wb, group, 16)
            for q in range(4 if GROUP == 16 else 8):
                codes = quad(wb, chunk_at(column), half * 4 + q)
                for c in unroll(4):
                    weight[c] = weight_of(number_of(codes, c), scale, zero)
                to = (column - first + half * 16 + q * 4) * 16
                if PAIRS:
                    store_i32(panel, to, pair_bf16(weight[0], weight[1]))
                    store_i32(panel, to + 32, pair_bf16(weight[2], weight[3]))
                else:
                    for c in unroll(4):
                        store(panel, to + c * 16, weight[c])
