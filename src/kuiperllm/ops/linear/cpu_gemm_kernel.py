"""CPU kernel that multiplies many rows of x (prefill) by a quantized matrix.

Two blocks of 16 outputs at a time: their codes, a thousand columns of them, are brought to bytes and their
scales to float32 in a panel that stays in cache. Then all rows of x pass by, ROWS at a time: sums of a group
of x stay in registers, those of all groups in scratch memory, and y is written once, when the last columns
have passed. See `cpu_codes_kernel.py` for the layout of weights and `cpu_round_kernel.py` for that of x. Work
items are pairs of blocks: neighbours or, if one gates the other, those that meet in the same columns of y.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add,
    as_f32p,
    as_i32p,
    broadcast,
    broadcast_4bytes,
    dot2_i16,
    dot4,
    f32p,
    fma,
    i8p,
    i32p,
    load,
    load_i32,
    mul,
    mul_i32,
    offset,
    prefetch_for_write,
    prefetch_to_l2,
    splat_i32,
    store,
    store_i32,
    to_f32,
    to_i32,
    u8p,
    unrelated,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline, registers, unroll
from kuiperllm.ops.linear.cpu_codes_kernel import (
    BYTE,
    CODING,
    GROUP,
    MIDDLE,
    MINIMUM,
    SCALE,
    ZEROS,
    block_at,
    chunk_at,
    load_scaled,
    load_super,
    pair_of_minimums,
    piece_at,
    quad,
)
from kuiperllm.ops.linear.cpu_output_kernel import start_value, write
from kuiperllm.ops.silu_mul.cpu_kernel import gated

# Template parameters beside those of the scheme.
XGROUP = 64  # columns of x that share a scale
BESIDE = 0  # vectors of a record beside its scales
ROWS = 6  # rows of x in a register tile
SLICE = 1024  # columns of a panel, whole XGROUPs
GATED = False  # the rows of W are a gate's and as many others: y is silu(gate) * other


@inline
def expand_codes(block, panel, first, columns):
    """Chunks of a block to quads of bytes, [columns/4][16][4]."""
    for column in range(0, columns, 32):
        chunk = chunk_at(first + column)
        for q in range(8):
            store_i32(as_i32p(panel), column * 4 + q * 16, quad(block, chunk, q))


@inline
def expand_records(block, panel, first, columns):
    """What belongs to a block's groups, a record for each XGROUP columns.

    A record is float32 scales [groups][16], followed by `BESIDE` vectors: zero points in int32 or minimums in
    float32 [groups][16]; or with super-blocks pairs of int16 minimums [groups/2][16][2] and their scale [16].
    """
    count = XGROUP // GROUP
    for part in range(columns // XGROUP):
        group, to = (first + part * XGROUP) // GROUP, part * (count + BESIDE) * 16
        beside = to + count * 16
        for g in range(count):
            store(panel, to + g * 16, load_scaled(block, group + g, 0))
            if CODING == ZEROS:
                zero = to_i32(load_scaled(block, group + g, 16))
                store_i32(as_i32p(panel), beside + g * 16, zero)
            if CODING == MINIMUM and SCALE != BYTE:
                store(panel, beside + g * 16, load_scaled(block, group + g, 16))
        if CODING == MINIMUM and SCALE == BYTE:
            piece = offset(block, piece_at(first + part * XGROUP))
            for pair in range(count // 2):
                store_i32(as_i32p(panel), beside + pair * 16, pair_of_minimums(piece, pair))
            store(panel, beside + count * 8, load_super(piece, 16))


@inline
def member(pair, b, n):
    """The first or the second block of a pair; the last pair may have the same one twice."""
    return pair + b * (n // 32) if GATED else min(2 * pair + b, (n + 15) // 16 - 1)


@inline
def finish(sums, bias, y, row, rows, pair, n, stride, has_bias, accumulate):
    """Sums of a tile to y."""
    for r in range(rows):
        yr = offset(y, (row + r) * stride)
        if GATED:
            gate = add(start_value(bias, yr, pair * 16, n, has_bias, 0), load(sums, r * 32))
            other = add(start_value(bias, yr, n // 2 + pair * 16, n, has_bias, 0), load(sums, r * 32 + 16))
            store(yr, pair * 16, gated(gate, other))
        else:
            for b in range(2 if pair * 32 + 16 < n else 1):
                column = pair * 32 + b * 16
                before = start_value(bias, yr, column, n, has_bias, accumulate)
                write(yr, column, n, add(before, load(sums, r * 32 + b * 16)))


def gemm_codes(
    w: u8p, xq: i8p, xs: f32p, xz: i32p, bias: f32p, y: f32p, scratch: u8p,
    m: int, n: int, k: int, stride: int, has_bias: int, accumulate: int, scratch_bytes: int,
    begin, end, thread,
):  # fmt: skip
    """y = x W^T. `scratch` holds, for each thread, a panel of codes, one of records, and sums of all rows."""
    count = XGROUP // GROUP
    record = (count + BESIDE) * 16
    panel = offset(scratch, thread * scratch_bytes)
    of_groups = as_f32p(offset(panel, SLICE * 32))
    all_sums = offset(of_groups, 2 * (SLICE // XGROUP) * record)
    code, records, ahead = registers(2), registers(2), registers(2)
    for pair in range(begin, end):
        for first in range(0, k, SLICE):
            columns = min(SLICE, k - first)
            for b in unroll(2):
                block = offset(w, block_at(member(pair, b, n), k))
                code[b] = offset(panel, b * SLICE * 16)
                expand_codes(block, code[b], first, columns)
                records[b] = offset(of_groups, b * (SLICE // XGROUP) * record)
                expand_records(block, records[b], first, columns)
            # What the next panel is made of comes from memory while rows pass by, some of it with each tile.
            then = first + columns if first + columns < k else 0
            next_pair = pair if then else pair + 1
            coming = piece_at(min(then + SLICE, k)) - piece_at(then) if next_pair < end else 0
            share = (coming * ROWS // m // 64 + 1) * 64
            for b in unroll(2):
                ahead[b] = offset(w, block_at(member(next_pair, b, n), k) + piece_at(then))
            for row in range(0, m, ROWS):
                for at in range(row // ROWS * share, min(coming, (row // ROWS + 1) * share), 64):
                    for b in unroll(2):
                        prefetch_to_l2(ahead[b], at)
                sums = offset(all_sums, row * 32)
                new_sums = unrelated(sums)  # else they are kept in registers, which are too few, and spilled
                x = offset(xq, row * k + first * ROWS)
                x_scales = offset(xs, (row * k + first * ROWS) // XGROUP)
                z = offset(xz, (row * k + first * ROWS) // GROUP)
                if CODING == MINIMUM and SCALE == BYTE:
                    z = offset(xz, (row * k + first * ROWS) // GROUP // 2)
                part, dot = registers(ROWS, 2), registers(ROWS, 2)
                if first + columns == k:  # lines of y miss the caches, and stores wait for each other
                    for r in unroll(ROWS):
                        for b in unroll(1 if GATED else 2):
                            prefetch_for_write(y, (row + r) * stride + (16 if GATED else 32) * pair + 16 * b)
                if first == 0:
                    for r in unroll(ROWS):
                        for b in unroll(2):
                            store(sums, r * 32 + b * 16, zeros())
                for r in unroll(ROWS):
                    for b in unroll(2):
                        part[r, b] = load(sums, r * 32 + b * 16)
                for p in range(columns // XGROUP):
                    at, beside = p * record, p * record + count * 16
                    if XGROUP > GROUP:
                        for r in unroll(ROWS):
                            for b in unroll(2):
                                part[r, b] = zeros()
                    if CODING == MINIMUM and SCALE == BYTE:
                        for r in unroll(ROWS):
                            for b in unroll(2):
                                dot[r, b] = splat_i32(np.int32(0))
                        for g in range(0, count, 2):
                            low0 = load_i32(as_i32p(records[0]), beside + g * 8)
                            low1 = load_i32(as_i32p(records[1]), beside + g * 8)
                            for r in unroll(ROWS):
                                pair_of_sums = splat_i32(z[(p * count + g) // 2 * ROWS + r])
                                dot[r, 0] = dot2_i16(dot[r, 0], low0, pair_of_sums)
                                dot[r, 1] = dot2_i16(dot[r, 1], low1, pair_of_sums)
                        for r in unroll(ROWS):
                            for b in unroll(2):
                                part[r, b] = mul(to_f32(dot[r, b]), load(records[b], beside + count * 8))
                    for g in range(count):
                        for r in unroll(ROWS):
                            if CODING != MINIMUM or SCALE != BYTE:
                                total = splat_i32(z[(p * count + g) * ROWS + r])
                            for b in unroll(2):
                                dot[r, b] = splat_i32(np.int32(0))
                                if CODING == MIDDLE:
                                    dot[r, b] = total
                                if CODING == ZEROS:
                                    dot[r, b] = mul_i32(total, load_i32(as_i32p(records[b]), beside + g * 16))
                                if CODING == MINIMUM and SCALE != BYTE:
                                    minimum = load(records[b], beside + g * 16)
                                    if XGROUP == GROUP:
                                        minimum = mul(minimum, broadcast(x_scales, p * ROWS + r))
                                    part[r, b] = fma(to_f32(total), minimum, part[r, b])
                        start = p * XGROUP + g * GROUP
                        for column in range(start, start + GROUP, 4):
                            v0, v1 = load_i32(code[0], column * 16), load_i32(code[1], column * 16)
                            for r in unroll(ROWS):
                                four = broadcast_4bytes(x, column * ROWS + r * 4)
                                dot[r, 0] = dot4(dot[r, 0], v0, four)
                                dot[r, 1] = dot4(dot[r, 1], v1, four)
                        scale0, scale1 = load(records[0], at + g * 16), load(records[1], at + g * 16)
                        for r in unroll(ROWS):
                            if XGROUP == GROUP:
                                x_scale = broadcast(x_scales, p * ROWS + r)
                                part[r, 0] = fma(to_f32(dot[r, 0]), mul(scale0, x_scale), part[r, 0])
                                part[r, 1] = fma(to_f32(dot[r, 1]), mul(scale1, x_scale), part[r, 1])
                            else:
                                part[r, 0] = fma(to_f32(dot[r, 0]), scale0, part[r, 0])
                                part[r, 1] = fma(to_f32(dot[r, 1]), scale1, part[r, 1])
                    if XGROUP > GROUP:
                        for r in unroll(ROWS):
                            x_scale = broadcast(x_scales, p * ROWS + r)
                            for b in unroll(2):
                                to = r * 32 + b * 16
                                store(new_sums, to, fma(part[r, b], x_scale, load(sums, to)))
                if XGROUP == GROUP:
                    for r in unroll(ROWS):
                        for b in unroll(2):
                            store(sums, r * 32 + b * 16, part[r, b])
                if first + columns == k:
                    finish(sums, bias, y, row, min(ROWS, m - row), pair, n, stride, has_bias, accumulate)
