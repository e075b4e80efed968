"""CPU kernel that multiplies many rows of x (prefill) by a quantized matrix.

Two blocks of 16 outputs at a time: their codes, some thousand columns of them, are brought to bytes and
their scales to float32 in a panel that stays in the second-level cache. Then all rows of x pass by, ROWS at a
time, whose sums stay in registers. See `cpu_codes_kernel.py` for the layout of weights and
`cpu_round_kernel.py` for that of x. Work items are pairs of blocks.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    as_f32p,
    as_i32p,
    broadcast,
    broadcast_4bytes,
    dot4,
    f32p,
    fma,
    i8p,
    i32p,
    load,
    load_f16,
    load_i32,
    mul,
    mul_i32,
    offset,
    splat_i32,
    store,
    store_i32,
    to_f32,
    to_i32,
    u8p,
    u16p,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline, registers, unroll
from kuiperllm.ops.linear.cpu_codes_kernel import (
    BITS,
    BYTE,
    CODING,
    GROUP,
    MIDDLE,
    MINIMUM,
    SCALE,
    SUPER,
    ZEROS,
    load_number,
    quad,
)
from kuiperllm.ops.linear.cpu_output_kernel import start_value, write

# Template parameters beside those of the scheme.
ROWS = 6  # rows of x in a register tile
SLICE = 4096  # columns of a panel


@inline
def expand_codes(w, panel, columns):
    """Chunks of a block to quads of bytes, [columns/4][16][4]."""
    for column in range(0, columns, 32):
        for q in range(8):
            store_i32(as_i32p(panel), column * 4 + q * 16, quad(w, column * BITS * 2, q))


@inline
def expand_records(scales, supers, panel, at, first, columns):
    """Records of a block's groups to float32 scales [groups][16], followed by their zeros or minimums.

    `at` and `first` are the block's first group and column; zero points become int32.
    """
    record = 16 if CODING == MIDDLE else 32
    for column in range(first, first + columns, GROUP):
        source, to = (at + column // GROUP) * record, (column - first) // GROUP * record
        scale = load_number(scales, source)
        if SCALE == BYTE:
            of_scales = ((at * GROUP) // SUPER + column // SUPER) * record
            scale = mul(scale, load_f16(supers, of_scales))
        store(panel, to, scale)
        if CODING == ZEROS:
            store_i32(as_i32p(panel), to + 16, to_i32(load_number(scales, source + 16)))
        if CODING == MINIMUM:
            minimum = load_number(scales, source + 16)
            if SCALE == BYTE:
                minimum = mul(minimum, load_f16(supers, of_scales + 16))
            store(panel, to + 16, minimum)


def gemm_codes(
    w: u8p, scales: u8p, supers: u16p, xq: i8p, xm: i32p, xz: i32p, xs: f32p, bias: f32p, y: f32p,
    scratch: u8p, m: int, n: int, k: int, stride: int, has_bias: int, accumulate: int, scratch_bytes: int,
    begin, end, thread,
):  # fmt: skip
    """y = x W^T."""
    last, groups, size = (n + 15) // 16 - 1, k // GROUP, GROUP if GROUP > 32 else 32
    record = 16 if CODING == MIDDLE else 32
    panel = offset(scratch, thread * scratch_bytes)
    sums = as_f32p(offset(panel, SLICE * 32))
    records = offset(sums, ROWS * 32)
    block, code, of_group = registers(2), registers(2), registers(2)
    for first in range(0, k, SLICE):
        columns = min(SLICE, k - first)
        for pair in range(begin, end):
            for b in unroll(2):
                block[b] = min(2 * pair + b, last)
                code[b] = offset(w, (block[b] * k + first) * BITS * 2)
                if BITS < 8:
                    expand_codes(code[b], offset(panel, b * SLICE * 16), columns)
                    code[b] = offset(panel, b * SLICE * 16)
                of_group[b] = offset(records, b * (SLICE // GROUP) * record)
                expand_records(scales, supers, of_group[b], block[b] * groups, first, columns)
            for row in range(0, m, ROWS):
                i, out, dot = registers(ROWS), registers(ROWS, 2), registers(ROWS, 2)
                for r in unroll(ROWS):
                    i[r] = row + r if row + r < m else m - 1
                    for b in unroll(2):
                        out[r, b] = zeros()
                for g in range(columns // GROUP):
                    at = g * record
                    for r in unroll(ROWS):
                        start = splat_i32(xz[i[r] * groups + first // GROUP + g])
                        for b in unroll(2):
                            if CODING == MIDDLE:
                                dot[r, b] = start
                            if CODING == ZEROS:
                                dot[r, b] = mul_i32(start, load_i32(of_group[b], at + 16))
                            if CODING == MINIMUM:
                                dot[r, b] = splat_i32(np.int32(0))
                                out[r, b] = fma(to_f32(start), load(of_group[b], at + 16), out[r, b])
                    for column in range(g * GROUP, g * GROUP + GROUP, 4):
                        v0, v1 = load_i32(code[0], column * 16), load_i32(code[1], column * 16)
                        for r in unroll(ROWS):
                            x = broadcast_4bytes(xq, i[r] * k + first + column)
                            dot[r, 0] = dot4(dot[r, 0], v0, x)
                            dot[r, 1] = dot4(dot[r, 1], v1, x)
                    scale0, scale1 = load(of_group[0], at), load(of_group[1], at)
                    for r in unroll(ROWS):
                        multiplier = splat_i32(xm[(i[r] * k + first + g * GROUP) // size])
                        out[r, 0] = fma(to_f32(mul_i32(dot[r, 0], multiplier)), scale0, out[r, 0])
                        out[r, 1] = fma(to_f32(mul_i32(dot[r, 1], multiplier)), scale1, out[r, 1])
                for r in unroll(ROWS):
                    for b in unroll(2):
                        store(sums, r * 32 + b * 16, out[r, b])
                for r in range(row, min(row + ROWS, m)):
                    for b in range(2 if 2 * pair < last else 1):
                        yr, column = offset(y, r * stride), (2 * pair + b) * 16
                        before = start_value(
                            bias, yr, column, n, has_bias and first == 0, accumulate or first > 0
                        )
                        total = load(sums, (r - row) * 32 + b * 16)
                        write(yr, column, n, fma(total, broadcast(xs, r), before))
