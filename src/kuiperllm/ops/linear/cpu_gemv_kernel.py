"""CPU kernel that multiplies a few rows of x (decode) by a quantized matrix, which it reads once.

Codes are taken apart in registers on their way to the int8 dot product, while memory delivers the next ones.
A thread reads one block after the other: with several at a time, memory delivers less.
See `cpu_codes_kernel.py` for the layout of weights and `cpu_round_kernel.py` for that of x. Work items are
blocks of 16 outputs.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add_i32,
    broadcast,
    broadcast_4bytes,
    dot4,
    f32p,
    fma,
    i8p,
    i32p,
    load_f16,
    load_i8,
    mul_i32,
    offset,
    prefetch,
    splat_i32,
    to_f32,
    to_i32,
    u8p,
    u16p,
    zeros,
)
from kuiperllm.backends.cpu.unroll import registers, unroll
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
ROWS = 1  # rows of x
CHAINS = 1  # sums that a row's dot products of a group take turns with

AHEAD = 4096  # bytes that codes are fetched ahead


def gemv_codes(
    w: u8p, scales: u8p, supers: u16p, xq: i8p, xm: i32p, xz: i32p, xs: f32p, bias: f32p, y: f32p,
    m: int, n: int, k: int, stride: int, has_bias: int, accumulate: int, begin, end, thread,
):  # fmt: skip
    """y = x W^T: m rows of x, no more than ROWS."""
    groups, size = k // GROUP, GROUP if GROUP > 32 else 32
    record = 16 if CODING == MIDDLE else 32
    scaled = SUPER if SCALE == BYTE else size  # columns whose sum is scaled at the end
    for block in range(begin, end):
        wb, sb, ub = offset(w, block * k * BITS * 2), block * groups * record, block * (k // SUPER) * record
        i, out, part, low = registers(ROWS), registers(ROWS), registers(ROWS), registers(ROWS)
        for r in unroll(ROWS):
            i[r], out[r] = r if r < m else m - 1, zeros()
        for first in range(0, k, scaled):
            for r in unroll(ROWS):
                part[r], low[r] = zeros(), splat_i32(np.int32(0))
            for j in range(first, first + scaled, size):
                dot = registers(ROWS, CHAINS)
                for h in range(2 if GROUP == 16 else 1):
                    g = j // GROUP + h
                    at = sb + g * record
                    for r in unroll(ROWS):
                        for c in unroll(CHAINS):
                            dot[r, c] = splat_i32(np.int32(0))
                        if CODING == MIDDLE:
                            dot[r, 0] = splat_i32(xz[i[r] * groups + g])
                        if CODING == ZEROS:
                            dot[r, 0] = mul_i32(
                                splat_i32(xz[i[r] * groups + g]), to_i32(load_number(scales, at + 16))
                            )
                        if CODING == MINIMUM and SCALE == BYTE:
                            low[r] = add_i32(
                                low[r], mul_i32(splat_i32(xz[i[r] * groups + g]), load_i8(scales, at + 16))
                            )
                        if CODING == MINIMUM and SCALE != BYTE:
                            out[r] = fma(
                                to_f32(splat_i32(xz[i[r] * groups + g])), load_number(scales, at + 16), out[r]
                            )
                    for column in range(j, j + size, 32):
                        chunk = column * BITS * 2
                        for q in range(h * 4, h * 4 + (4 if GROUP == 16 else 8), CHAINS):
                            for c in unroll(CHAINS):
                                if q + c < BITS:
                                    prefetch(wb, chunk + AHEAD + (q + c) * 64)
                                v = quad(wb, chunk, q + c)
                                for r in unroll(ROWS):
                                    x = broadcast_4bytes(xq, i[r] * k + column + (q + c) * 4)
                                    dot[r, c] = dot4(dot[r, c], v, x)
                    scale = load_number(scales, at)
                    for r in unroll(ROWS):
                        for c in unroll(CHAINS - 1):
                            dot[r, 0] = add_i32(dot[r, 0], dot[r, c + 1])
                        total = to_f32(mul_i32(dot[r, 0], splat_i32(xm[i[r] * (k // size) + j // size])))
                        if SCALE == BYTE:
                            part[r] = fma(total, scale, part[r])
                        else:
                            out[r] = fma(total, scale, out[r])
            if SCALE == BYTE:
                at = ub + first // SUPER * record
                for r in unroll(ROWS):
                    out[r] = fma(part[r], load_f16(supers, at), out[r])
                    if CODING == MINIMUM:
                        out[r] = fma(to_f32(low[r]), load_f16(supers, at + 16), out[r])
        for r in unroll(ROWS):
            if r < m:
                yr = offset(y, r * stride)
                begin_with = start_value(bias, yr, block * 16, n, has_bias, accumulate)
                write(yr, block * 16, n, fma(out[r], broadcast(xs, r), begin_with))
