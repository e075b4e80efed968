"""CPU kernel that multiplies a few rows of x (decode) by a quantized matrix, which it reads once.

Codes are taken apart in registers on their way to the int8 dot product, while memory delivers the next ones.
A thread reads one block after the other: with several at a time, memory delivers less. It asks for lines
ahead one by one, between the dot products: several together are slower.
See `cpu_codes_kernel.py` for the layout of weights and `cpu_round_kernel.py` for that of x. Work items are
blocks of 16 outputs.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add,
    add_i32,
    broadcast,
    broadcast_4bytes,
    dot2_i16,
    dot4,
    f32p,
    fma,
    i8p,
    i32p,
    mul,
    mul_i32,
    offset,
    prefetch,
    splat_i32,
    to_f32,
    to_i32,
    u8p,
    zeros,
)
from kuiperllm.backends.cpu.unroll import registers, unroll
from kuiperllm.ops.linear.cpu_codes_kernel import (
    BYTE,
    CODING,
    GROUP,
    MIDDLE,
    MINIMUM,
    PIECE,
    SCALE,
    STREAM,
    ZEROS,
    block_at,
    chunk_at,
    load_number,
    load_super,
    multiplier_of,
    pair_of_minimums,
    piece_at,
    quad,
    record_at,
)
from kuiperllm.ops.linear.cpu_output_kernel import start_value, write

# Template parameters beside those of the scheme.
XGROUP = 64  # columns of x that share a scale
ROWS = 1  # rows of x
CHAINS = 1  # sums that a row's dot products of a group take turns with

AHEAD = 4096  # bytes that codes are fetched ahead


def gemv_codes(
    w: u8p, xq: i8p, xs: f32p, xz: i32p, bias: f32p, y: f32p,
    m: int, n: int, k: int, stride: int, has_bias: int, accumulate: int, begin, end, thread,
):  # fmt: skip
    """y = x W^T: m rows of x, no more than ROWS."""
    step = GROUP if GROUP > 32 else 32
    for block in range(begin, end):
        wb = offset(w, block_at(block, k))
        out, part, dot = registers(ROWS), registers(ROWS), registers(ROWS, CHAINS)
        for r in unroll(ROWS):
            out[r] = zeros()
        for first in range(0, k, XGROUP):
            piece = offset(wb, piece_at(first))
            for r in unroll(ROWS):
                part[r] = zeros()
            for j in range(first, first + XGROUP, step):
                for h in range(2 if GROUP == 16 else 1):
                    g = j // GROUP + h
                    at = record_at(g)
                    for r in unroll(ROWS):
                        for c in unroll(CHAINS):
                            dot[r, c] = splat_i32(np.int32(0))
                        if CODING == MIDDLE:
                            dot[r, 0] = splat_i32(xz[g * ROWS + r])
                        if CODING == ZEROS:
                            zero = to_i32(load_number(wb, at + 16))
                            dot[r, 0] = mul_i32(splat_i32(xz[g * ROWS + r]), zero)
                        if CODING == MINIMUM and SCALE != BYTE:
                            total = to_f32(splat_i32(xz[g * ROWS + r]))
                            part[r] = fma(total, load_number(wb, at + 16), part[r])
                    for column in range(j, j + step, 32):
                        chunk = chunk_at(column)
                        for q in range(h * 4, h * 4 + (4 if GROUP == 16 else 8), CHAINS):
                            for c in unroll(CHAINS):
                                if (q + c) * 64 < STREAM:
                                    prefetch(wb, column // 32 * STREAM + AHEAD + (q + c) * 64)
                                v = quad(wb, chunk, q + c)
                                for r in unroll(ROWS):
                                    x = broadcast_4bytes(xq, (column + (q + c) * 4) * ROWS + r * 4)
                                    dot[r, c] = dot4(dot[r, c], v, x)
                    if SCALE == BYTE:
                        scale = multiplier_of(piece, g - first // GROUP)
                    else:
                        scale = load_number(wb, at)
                    for r in unroll(ROWS):
                        for c in unroll(CHAINS - 1):
                            dot[r, 0] = add_i32(dot[r, 0], dot[r, c + 1])
                        part[r] = fma(to_f32(dot[r, 0]), scale, part[r])
            for r in unroll(ROWS):
                x_scale = broadcast(xs, first // XGROUP * ROWS + r)
                if SCALE == BYTE:
                    out[r] = fma(part[r], mul(load_super(piece, 0), x_scale), out[r])
                    if CODING == MINIMUM:
                        dot[r, 0] = splat_i32(np.int32(0))
                        for p in unroll(PIECE // GROUP // 2):
                            sums = splat_i32(xz[(first // GROUP // 2 + p) * ROWS + r])
                            dot[r, 0] = dot2_i16(dot[r, 0], pair_of_minimums(piece, p), sums)
                        minimum = mul(load_super(piece, 16), x_scale)
                        out[r] = fma(to_f32(dot[r, 0]), minimum, out[r])
                else:
                    out[r] = fma(part[r], x_scale, out[r])
        for r in unroll(ROWS):
            if r < m:
                yr = offset(y, r * stride)
                before = start_value(bias, yr, block * 16, n, has_bias, accumulate)
                write(yr, block * 16, n, add(before, out[r]))
