"""CPU kernels that bring weights into blocks of 16 rows: floating point; codes of files and what belongs to
their groups; rounding.

Work items are blocks. The rows that the last block lacks are zeros.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add_i32,
    as_f32p,
    as_i32p,
    as_u16p,
    div,
    float_to_half,
    fma,
    half_to_float,
    i8p,
    i32p,
    load,
    load_8bytes,
    load_bf16,
    load_f16,
    max_lanes,
    min_lanes,
    offset,
    round_to_i32,
    splat,
    splat_i32,
    store_i8,
    sum_lanes,
    u8p,
    u16p,
    vmax,
    vmin,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline, unroll
from kuiperllm.ops.linear.cpu_codes_kernel import (
    BITS,
    CODING,
    GROUP,
    HALF,
    MIDDLE,
    MINIMUM,
    PIECE,
    RECORDS,
    SCALE,
    ZEROS,
    block_at,
    chunk_at,
    piece_at,
    record_at,
)

# Template parameters.
FORMAT = 0  # of weights to be rounded: FLOAT32, FLOAT16 or BFLOAT16

# Template parameters: where a file has codes, as `quant.codes.CodeLayout` says.
BLOCK = 32
BLOCK_BYTES = 32
FLIP = 0  # XORed to eight codes
PLANES = 1
OFFSET_0, BITS_0, RUN_0 = 0, 8, 1
OFFSET_1, BITS_1, RUN_1 = 0, 0, 1
OFFSET_2, BITS_2, RUN_2 = 0, 0, 1

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
ONES = 0x0101010101010101


# --- floating point ---------------------------------------------------------------------------------------


def pack_words(source: i32p, packed: i32p, n: int, words: int, begin, end, thread):
    """Rows of 32-bit words to blocks of 16 rows, [N][words] -> [N/16][words][16]."""
    for block in range(begin, end):
        out = offset(packed, block * words * 16)
        for r in range(16):
            if block * 16 + r < n:
                row = offset(source, (block * 16 + r) * words)
                for j in range(words):
                    out[j * 16 + r] = row[j]
            else:
                for j in range(words):
                    out[j * 16 + r] = np.int32(0)


def pack_halves(source: u16p, packed: u16p, n: int, k: int, begin, end, thread):
    """Rows of 16-bit values to blocks of 16 rows, [N][K] -> [N/16][K][16]."""
    for block in range(begin, end):
        out = offset(packed, block * k * 16)
        for r in range(16):
            if block * 16 + r < n:
                row = offset(source, (block * 16 + r) * k)
                for j in range(k):
                    out[j * 16 + r] = row[j]
            else:
                for j in range(k):
                    out[j * 16 + r] = np.uint16(0)


# --- codes ------------------------------------------------------------------------------------------------


@inline
def bits_of_eight(source, at, column, bits, run):
    """What a plane that begins at byte `at` holds of eight columns, in eight bytes."""
    if bits == 8:
        return load_8bytes(source, at + column)
    if run == 1:
        spread = np.int64(0)
        for byte in range(bits):
            spread |= np.int64(source[at + column * bits // 8 + byte]) << (8 * byte)
        spread = (spread | spread << (4 * (8 - bits))) & (((1 << 4 * bits) - 1) * 0x100000001)
        spread = (spread | spread << (2 * (8 - bits))) & (((1 << 2 * bits) - 1) * 0x1000100010001)
        return (spread | spread << (8 - bits)) & (((1 << bits) - 1) * ONES)
    span = run * 8 // bits
    stored = load_8bytes(source, at + column // span * run + column % run)
    return (stored >> (column % span // run * bits)) & (((1 << bits) - 1) * ONES)


@inline
def codes_of_eight(row, column):
    """The codes of eight columns of a row, in eight bytes."""
    at, within = column // BLOCK * BLOCK_BYTES, column % BLOCK
    codes = bits_of_eight(row, at + OFFSET_0, within, BITS_0, RUN_0)
    if PLANES > 1:
        codes |= bits_of_eight(row, at + OFFSET_1, within, BITS_1, RUN_1) << BITS_0
    if PLANES > 2:
        codes |= bits_of_eight(row, at + OFFSET_2, within, BITS_2, RUN_2) << (BITS_0 + BITS_1)
    return codes ^ FLIP


@inline
def place(packed, at, a, b, c, d):
    """Write the codes of 32 columns of a row, eight to an argument, to words of a chunk, from `at` on."""
    if BITS == 8:
        place_bytes(packed, at, a)
        place_bytes(packed, at + 32, b)
        place_bytes(packed, at + 64, c)
        place_bytes(packed, at + 96, d)
        return
    rest, then = 0, at
    if BITS >= 4:
        packed[at] = np.int32(two_quads(a, 0, 4))
        packed[at + 16] = np.int32(two_quads(b, 0, 4))
        packed[at + 32] = np.int32(two_quads(c, 0, 4))
        packed[at + 48] = np.int32(two_quads(d, 0, 4))
        rest, then = 4, at + 64
    if BITS == 2 or BITS == 3 or BITS == 6:
        packed[then] = np.int32(two_quads(a, rest, 2) | two_quads(b, rest, 2) << 4)
        packed[then + 16] = np.int32(two_quads(c, rest, 2) | two_quads(d, rest, 2) << 4)
        rest, then = rest + 2, then + 32
    if BITS == 3 or BITS == 5:
        low = two_quads(a, rest, 1) | two_quads(b, rest, 1) << 2
        packed[then] = np.int32(low | two_quads(c, rest, 1) << 4 | two_quads(d, rest, 1) << 6)


@inline
def place_bytes(packed, at, codes):
    packed[at] = np.int32(codes)
    packed[at + 16] = np.int32(codes >> 32)


@inline
def two_quads(codes, shift, bits):
    """Some bits of eight codes: those of the first four in the low bits of four bytes, the others above."""
    kept = (codes >> shift) & (((1 << bits) - 1) * ONES)
    return (kept | kept >> (32 - bits)) & 0xFFFFFFFF


def pack_codes(source: u8p, packed: i32p, n: int, k: int, row_bytes: int, begin, end, thread):
    """Rows of codes as a file has them to blocks; `row_bytes`: from a row to the next.

    k is a multiple of 16; the columns that the last chunk lacks have the code 0.
    """
    chunks = (k + 31) // 32
    for block in range(begin, end):
        out = offset(packed, block_at(block, chunks * 32) // 4)
        for r in range(16):
            row = offset(source, (block * 16 + r) * row_bytes)
            for chunk in range(chunks):
                a, b, c, d = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
                if block * 16 + r < n:
                    a, b = codes_of_eight(row, chunk * 32), codes_of_eight(row, chunk * 32 + 8)
                    if chunk * 32 + 16 < k:
                        c, d = codes_of_eight(row, chunk * 32 + 16), codes_of_eight(row, chunk * 32 + 24)
                place(out, chunk_at(chunk * 32) // 4 + r, a, b, c, d)


# --- what belongs to groups ---------------------------------------------------------------------------------


@inline
def clear_records(block, k):
    """Zeros for what belongs to the groups of a block of k columns, a multiple of 32."""
    for column in range(0, k, PIECE):
        piece = offset(block, piece_at(column))
        for i in range(RECORDS):
            piece[i] = np.uint8(0)


def pack_records(scales: u8p, seconds: u8p, packed: u8p, n: int, k: int, begin, end, thread):
    """Scales [n][k/GROUP], and zero points or minimums as wide, to before the codes of the pieces.

    Where the coding has no seconds, any address does. Rows and groups that are missing have scales of 0.
    """
    groups, columns = k // GROUP, (k + 31) // 32 * 32
    width = 2 if SCALE == HALF else 4
    for block in range(begin, end):
        out = offset(packed, block_at(block, columns))
        clear_records(out, columns)
        for r in range(min(16, n - block * 16)):
            row = (block * 16 + r) * groups * width
            for g in range(groups):
                to = (record_at(g) + r) * width
                for byte in unroll(4):
                    if byte < width:
                        out[to + byte] = scales[row + g * width + byte]
                        if CODING == ZEROS or CODING == MINIMUM:
                            out[to + 16 * width + byte] = seconds[row + g * width + byte]


@inline
def bytes_of_four(source, g, groups):
    """Bytes g to g + 3 of a row of `groups` of them, the first one the lowest; those that it lacks are 0."""
    word = 0
    for j in range(min(4, groups - g)):
        word |= np.int64(source[g + j]) << (8 * j)
    return word


@inline
def place_record(to, r, scales, minimums):
    """What the groups of a super-block are multiplied by, of row r of a block."""
    groups = PIECE // GROUP
    if CODING == MIDDLE:
        for g in range(groups):
            to[g * 16 + r] = scales[g]
    elif BITS == 2:
        for g in range(0, groups, 4):
            low, high = bytes_of_four(scales, g, groups), bytes_of_four(minimums, g, groups)
            as_i32p(to)[g * 4 + r] = np.int32(low | high << 4)
    else:
        for g in range(0, groups, 8):
            words = offset(as_i32p(to), g * 6 + r)
            rest = bytes_of_four(minimums, g + 4, groups)
            words[0] = np.int32(bytes_of_four(scales, g, groups) | (rest & 0x03030303) << 6)
            words[16] = np.int32(bytes_of_four(scales, g + 4, groups) | (rest & 0x0C0C0C0C) << 4)
            words[32] = np.int32(bytes_of_four(minimums, g, groups) | (rest & 0x30303030) << 2)


def pack_super_blocks(
    scales: u8p, minimums: u8p, supers: u16p, super_minimums: u16p, packed: u8p, n: int, k: int,
    begin, end, thread,
):  # fmt: skip
    """The same with super-blocks: multipliers [n][k/GROUP], and of both [n][k/PIECE] what they multiply."""
    groups, count = k // GROUP, k // PIECE
    halves = 16 if CODING == MIDDLE else 32
    for block in range(begin, end):
        out = offset(packed, block_at(block, k))
        clear_records(out, k)
        for part in range(count):
            piece = offset(out, piece_at(part * PIECE))
            of_records = as_u16p(offset(piece, RECORDS - 2 * halves))
            for r in range(min(16, n - block * 16)):
                row = block * 16 + r
                first = row * groups + part * (PIECE // GROUP)
                place_record(piece, r, offset(scales, first), offset(minimums, first))
                of_records[r] = supers[row * count + part]
                if CODING == MINIMUM:
                    of_records[16 + r] = super_minimums[row * count + part]


# --- rounding ---------------------------------------------------------------------------------------------


@inline
def load_source(source, index):
    if FORMAT == FLOAT32:
        return load(as_f32p(source), index)
    if FORMAT == FLOAT16:
        return load_f16(as_u16p(source), index)
    return load_bf16(as_u16p(source), index)


def quantize_pack(source: u8p, packed: u8p, scratch: i8p, failed: i32p, n: int, k: int, begin, end, thread):
    """Rows of floating point to blocks of symmetric codes with float16 scales, as `quant.rounding` says.

    `failed` becomes 1 if a weight is NaN or infinite, 2 if one is too large for a float16 scale. `scratch`
    has room for the codes of a row, padded to a multiple of 32 columns, for each thread.
    """
    chunks, groups = (k + 31) // 32, (k + 31) // 32 * 32 // GROUP
    codes = offset(scratch, thread * chunks * 32)
    middle = 1 << (BITS - 1)
    # what the largest weight is divided by, and what it may be divided by a rounded scale
    parts = np.float32(127 if BITS == 8 else -(middle + 0.25))
    reach = np.float32(127.5 if BITS == 8 else middle + 0.5)
    least = splat(np.float32(-127 if BITS == 8 else -middle))
    most = splat(np.float32(middle - 1))
    for block in range(begin, end):
        out = offset(packed, block_at(block, chunks * 32))
        clear_records(out, chunks * 32)
        for r in range(16):
            row = block * 16 + r
            for g in range(groups):
                if row >= n or g * GROUP >= k:
                    for j in range(g * GROUP, g * GROUP + GROUP, 16):
                        store_i8(codes, j, splat_i32(np.int32(middle)))
                    continue
                first = row * k + g * GROUP
                high, low, poison = load_source(source, first), load_source(source, first), zeros()
                for j in range(0, GROUP, 16):
                    v = load_source(source, first + j)
                    high, low, poison = vmax(v, high), vmin(v, low), fma(v, zeros(), poison)
                top, bottom, check = max_lanes(high), min_lanes(low), sum_lanes(poison)
                largest = top if top >= -bottom else bottom
                if BITS == 8:
                    largest = abs(largest)
                wanted = largest / parts
                if not check == np.float32(0):
                    failed[0] = np.int32(1)
                elif abs(wanted) > np.float32(65504):
                    failed[0] = np.int32(2)
                half = float_to_half(wanted)
                if abs(half_to_float(half)) * reach < abs(largest):
                    half = np.uint16(half + np.uint16(1))
                scale = half_to_float(half)
                divisor = splat(scale if scale != np.float32(0) else np.float32(1))
                for j in range(0, GROUP, 16):
                    ratio = div(load_source(source, first + j), divisor)
                    whole = round_to_i32(vmin(vmax(ratio, least), most))
                    store_i8(codes, g * GROUP + j, add_i32(whole, splat_i32(np.int32(middle))))
                as_u16p(out)[record_at(g) + r] = half
            for chunk in range(chunks):
                a, b = load_8bytes(codes, chunk * 32), load_8bytes(codes, chunk * 32 + 8)
                c, d = load_8bytes(codes, chunk * 32 + 16), load_8bytes(codes, chunk * 32 + 24)
                place(as_i32p(out), chunk_at(chunk * 32) // 4 + r, a, b, c, d)
