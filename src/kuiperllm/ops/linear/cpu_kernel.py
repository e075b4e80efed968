"""CPU kernels of the linear operator: y = x W^T, weights in blocks of 16 rows.

A block holds 16 rows of W side by side, so that one vector is 16 outputs and nothing is summed across lanes:

    float32, float16   [N/16][K][16]
    bfloat16           [N/16][K/2][16][2]    pairs, as the bfloat16 dot product wants them
    q8                 [N/16][K/4][16][4]    bytes with an offset of 128, as the int8 dot product wants them
                       scales [N/16][K/GROUP][16]

`gemv_*` is for one row of x (decode): it streams W once, two blocks at a time. `gemm_*` is for more: a tile
of ROWS x 2 blocks stays in registers, the two blocks in the cache. Work items are pairs of blocks.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add,
    add_i32,
    as_f32p,
    as_i32p,
    as_u16p,
    broadcast,
    broadcast_4bytes,
    div,
    dot2_bf16,
    dot4,
    even_bf16,
    f32p,
    float_to_half,
    fma,
    half_to_float,
    i8p,
    i32p,
    load,
    load_bf16,
    load_f16,
    load_first,
    load_i32,
    max_lanes,
    mul,
    odd_bf16,
    offset,
    prefetch,
    round_to_i32,
    splat,
    splat_i32,
    store,
    store_bf16,
    store_first,
    store_i8,
    sum_lanes,
    sum_lanes_i32,
    to_f32,
    u8p,
    u16p,
    vabs,
    vmax,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline, registers, unroll

# Template parameters.
GROUP = 64  # q8: weights that share a scale
HALF_SCALES = True  # q8: scales are float16, else float32
FORMAT = 0  # FLOAT32, FLOAT16 or BFLOAT16
BIAS = False
ACCUMULATE = False  # add to what y holds
ROWS = 6  # rows of x in a register tile

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
AHEAD = 4096  # bytes that a stream of weights is fetched ahead
SLICE = 8192  # columns of W that a pass over x works on


@inline
def start_value(bias, y, column, n):
    """What the sums of 16 outputs begin with."""
    value = load(bias, column) if BIAS else zeros()
    if ACCUMULATE:
        value = fma(load_first(y, column, n - column), splat(np.float32(1)), value)
    return value


@inline
def write(y, column, n, value):
    """Store 16 outputs, fewer at the end of a row."""
    if column + 16 <= n:
        store(y, column, value)
    else:
        store_first(y, column, value, n - column)


@inline
def load_scale(scales, index):
    return load_f16(as_u16p(scales), index) if HALF_SCALES else load(scales, index)


# --- one row ----------------------------------------------------------------------------------------------


def gemv_q8(
    w: u8p, scales: f32p, xq: i8p, xs: f32p, xz: i32p, bias: f32p, y: f32p, n: int, k: int, begin, end, thread
):
    groups = k // GROUP
    last = (n + 15) // 16 - 1
    for pair in range(begin, end):
        b0, b1 = 2 * pair, min(2 * pair + 1, last)
        w0, w1 = offset(w, b0 * k * 16), offset(w, b1 * k * 16)
        s0, s1 = b0 * groups * 16, b1 * groups * 16
        y0, y1 = start_value(bias, y, b0 * 16, n), start_value(bias, y, b1 * 16, n)
        for g in range(groups):
            dot = splat_i32(xz[g])
            dot0, dot1 = dot, dot
            for j in range(g * GROUP, g * GROUP + GROUP, 4):
                x = broadcast_4bytes(xq, j)
                prefetch(w0, j * 16 + AHEAD)
                prefetch(w1, j * 16 + AHEAD)
                dot0 = dot4(dot0, load_i32(w0, j * 16), x)
                dot1 = dot4(dot1, load_i32(w1, j * 16), x)
            scale = broadcast(xs, g)
            y0 = fma(to_f32(dot0), mul(load_scale(scales, s0 + g * 16), scale), y0)
            y1 = fma(to_f32(dot1), mul(load_scale(scales, s1 + g * 16), scale), y1)
        write(y, b0 * 16, n, y0)
        if b1 > b0:
            write(y, b1 * 16, n, y1)


def gemv_float(w: u8p, x: f32p, bias: f32p, y: f32p, n: int, k: int, begin, end, thread):
    last = (n + 15) // 16 - 1
    size = k * 64 if FORMAT == FLOAT32 else k * 32 if FORMAT == FLOAT16 else (k + 1) // 2 * 64
    for pair in range(begin, end):
        b0, b1 = 2 * pair, min(2 * pair + 1, last)
        w0, w1 = offset(w, b0 * size), offset(w, b1 * size)
        even0, even1 = start_value(bias, y, b0 * 16, n), start_value(bias, y, b1 * 16, n)
        odd0, odd1 = zeros(), zeros()
        for i in range(0, k - 1, 2):
            xe, xo = broadcast(x, i), broadcast(x, i + 1)
            if FORMAT == FLOAT32:
                prefetch(w0, i * 64 + AHEAD)
                prefetch(w0, i * 64 + 64 + AHEAD)
                prefetch(w1, i * 64 + AHEAD)
                prefetch(w1, i * 64 + 64 + AHEAD)
                even0 = fma(load(as_f32p(w0), i * 16), xe, even0)
                odd0 = fma(load(as_f32p(w0), i * 16 + 16), xo, odd0)
                even1 = fma(load(as_f32p(w1), i * 16), xe, even1)
                odd1 = fma(load(as_f32p(w1), i * 16 + 16), xo, odd1)
            else:
                prefetch(w0, i * 32 + AHEAD)
                prefetch(w1, i * 32 + AHEAD)
                if FORMAT == FLOAT16:
                    even0 = fma(load_f16(as_u16p(w0), i * 16), xe, even0)
                    odd0 = fma(load_f16(as_u16p(w0), i * 16 + 16), xo, odd0)
                    even1 = fma(load_f16(as_u16p(w1), i * 16), xe, even1)
                    odd1 = fma(load_f16(as_u16p(w1), i * 16 + 16), xo, odd1)
                else:
                    pairs0, pairs1 = load_i32(w0, i * 32), load_i32(w1, i * 32)
                    even0 = fma(even_bf16(pairs0), xe, even0)
                    odd0 = fma(odd_bf16(pairs0), xo, odd0)
                    even1 = fma(even_bf16(pairs1), xe, even1)
                    odd1 = fma(odd_bf16(pairs1), xo, odd1)
        if k % 2:
            xe = broadcast(x, k - 1)
            even0 = fma(last_column(w0, k), xe, even0)
            even1 = fma(last_column(w1, k), xe, even1)
        write(y, b0 * 16, n, add(even0, odd0))
        if b1 > b0:
            write(y, b1 * 16, n, add(even1, odd1))


@inline
def last_column(w, k):
    """Column k - 1 of a block, for odd k."""
    if FORMAT == FLOAT32:
        return load(as_f32p(w), (k - 1) * 16)
    if FORMAT == FLOAT16:
        return load_f16(as_u16p(w), (k - 1) * 16)
    return even_bf16(load_i32(w, (k - 1) * 32))


# --- several rows -----------------------------------------------------------------------------------------


@inline
def partial_sum(bias, y, column, n, first):
    """What the sums of 16 outputs go on from, in the first slice of columns and later."""
    return start_value(bias, y, column, n) if first else load_first(y, column, n - column)


def gemm_q8(
    w: u8p, scales: f32p, xq: i8p, xs: f32p, xz: i32p, bias: f32p, y: f32p,
    m: int, n: int, k: int, stride: int, begin, end, thread,
):  # fmt: skip
    groups, last = k // GROUP, (n + 15) // 16 - 1
    step = max(SLICE // GROUP, 1)
    for g0 in range(0, groups, step):
        for pair in range(begin, end):
            b0, b1 = 2 * pair, min(2 * pair + 1, last)
            w0, w1 = offset(w, b0 * k * 16), offset(w, b1 * k * 16)
            s0, s1 = b0 * groups * 16, b1 * groups * 16
            for row in range(0, m, ROWS):
                i, out, dot = registers(ROWS), registers(ROWS, 2), registers(ROWS, 2)
                for r in unroll(ROWS):
                    i[r] = min(row + r, m - 1)
                    yr = offset(y, i[r] * stride)
                    out[r, 0] = partial_sum(bias, yr, b0 * 16, n, g0 == 0)
                    out[r, 1] = partial_sum(bias, yr, b1 * 16, n, g0 == 0)
                for g in range(g0, min(g0 + step, groups)):
                    for r in unroll(ROWS):
                        dot[r, 0] = splat_i32(xz[i[r] * groups + g])
                        dot[r, 1] = dot[r, 0]
                    for j in range(g * GROUP, g * GROUP + GROUP, 4):
                        v0, v1 = load_i32(w0, j * 16), load_i32(w1, j * 16)
                        for r in unroll(ROWS):
                            x = broadcast_4bytes(xq, i[r] * k + j)
                            dot[r, 0] = dot4(dot[r, 0], v0, x)
                            dot[r, 1] = dot4(dot[r, 1], v1, x)
                    scale0, scale1 = load_scale(scales, s0 + g * 16), load_scale(scales, s1 + g * 16)
                    for r in unroll(ROWS):
                        scale = broadcast(xs, i[r] * groups + g)
                        out[r, 0] = fma(to_f32(dot[r, 0]), mul(scale0, scale), out[r, 0])
                        out[r, 1] = fma(to_f32(dot[r, 1]), mul(scale1, scale), out[r, 1])
                for r in unroll(ROWS):
                    if row + r < m:
                        write(offset(y, i[r] * stride), b0 * 16, n, out[r, 0])
                        if b1 > b0:
                            write(offset(y, i[r] * stride), b1 * 16, n, out[r, 1])


def gemm_float(
    w: u8p,
    x: f32p,
    bias: f32p,
    y: f32p,
    m: int,
    n: int,
    k: int,
    x_stride: int,
    stride: int,
    begin,
    end,
    thread,
):
    last = (n + 15) // 16 - 1
    size = k * 64 if FORMAT == FLOAT32 else k * 32 if FORMAT == FLOAT16 else (k + 1) // 2 * 64
    for k0 in range(0, k, SLICE):
        k1 = min(k0 + SLICE, k)
        for pair in range(begin, end):
            b0, b1 = 2 * pair, min(2 * pair + 1, last)
            w0, w1 = offset(w, b0 * size), offset(w, b1 * size)
            for row in range(0, m, ROWS):
                xr, yr, out = registers(ROWS), registers(ROWS), registers(ROWS, 2)
                for r in unroll(ROWS):
                    i = min(row + r, m - 1)
                    xr[r], yr[r] = offset(x, i * x_stride), offset(y, i * stride)
                    out[r, 0] = partial_sum(bias, yr[r], b0 * 16, n, k0 == 0)
                    out[r, 1] = partial_sum(bias, yr[r], b1 * 16, n, k0 == 0)
                if FORMAT == BFLOAT16:
                    for j in range(k0, k1 - 1, 2):
                        pairs0, pairs1 = load_i32(w0, j * 32), load_i32(w1, j * 32)
                        e0, e1, o0, o1 = (
                            even_bf16(pairs0),
                            even_bf16(pairs1),
                            odd_bf16(pairs0),
                            odd_bf16(pairs1),
                        )
                        for r in unroll(ROWS):
                            v = broadcast(xr[r], j)
                            out[r, 0] = fma(e0, v, out[r, 0])
                            out[r, 1] = fma(e1, v, out[r, 1])
                        for r in unroll(ROWS):
                            v = broadcast(xr[r], j + 1)
                            out[r, 0] = fma(o0, v, out[r, 0])
                            out[r, 1] = fma(o1, v, out[r, 1])
                for j in range(k1 - (k1 - k0) % 2 if FORMAT == BFLOAT16 else k0, k1):
                    if FORMAT == FLOAT32:
                        e0, e1 = load(as_f32p(w0), j * 16), load(as_f32p(w1), j * 16)
                    elif FORMAT == FLOAT16:
                        e0, e1 = load_f16(as_u16p(w0), j * 16), load_f16(as_u16p(w1), j * 16)
                    else:
                        e0, e1 = even_bf16(load_i32(w0, j * 32)), even_bf16(load_i32(w1, j * 32))
                    for r in unroll(ROWS):
                        v = broadcast(xr[r], j)
                        out[r, 0] = fma(e0, v, out[r, 0])
                        out[r, 1] = fma(e1, v, out[r, 1])
                for r in unroll(ROWS):
                    if row + r < m:
                        write(yr[r], b0 * 16, n, out[r, 0])
                        if b1 > b0:
                            write(yr[r], b1 * 16, n, out[r, 1])


def gemm_bf16(w: u8p, xb: u16p, bias: f32p, y: f32p, m: int, n: int, k: int, stride: int, begin, end, thread):
    """bfloat16 x bfloat16 by the dot product of pairs; xb holds rows of k bfloat16, k even."""
    last = (n + 15) // 16 - 1
    for k0 in range(0, k, SLICE):
        for pair in range(begin, end):
            b0, b1 = 2 * pair, min(2 * pair + 1, last)
            w0, w1 = offset(w, b0 * k * 32), offset(w, b1 * k * 32)
            for row in range(0, m, ROWS):
                xr, yr, out = registers(ROWS), registers(ROWS), registers(ROWS, 2)
                for r in unroll(ROWS):
                    i = min(row + r, m - 1)
                    xr[r], yr[r] = offset(xb, i * k), offset(y, i * stride)
                    out[r, 0] = partial_sum(bias, yr[r], b0 * 16, n, k0 == 0)
                    out[r, 1] = partial_sum(bias, yr[r], b1 * 16, n, k0 == 0)
                for j in range(k0, min(k0 + SLICE, k), 2):
                    pairs0, pairs1 = load_i32(w0, j * 32), load_i32(w1, j * 32)
                    for r in unroll(ROWS):
                        v = broadcast_4bytes(xr[r], j)
                        out[r, 0] = dot2_bf16(out[r, 0], v, pairs0)
                        out[r, 1] = dot2_bf16(out[r, 1], v, pairs1)
                for r in unroll(ROWS):
                    if row + r < m:
                        write(yr[r], b0 * 16, n, out[r, 0])
                        if b1 > b0:
                            write(yr[r], b1 * 16, n, out[r, 1])


# --- activations ------------------------------------------------------------------------------------------


def quantize_rows(x: f32p, xq: i8p, xs: f32p, xz: i32p, k: int, stride: int, begin, end, thread):
    """Rows of x to int8 groups, and what undoes the offset of the weights: xz = -128 x the group's sum."""
    groups = k // GROUP
    for row in range(begin, end):
        xr, qr = offset(x, row * stride), offset(xq, row * k)
        for g in range(groups):
            largest = zeros()
            for j in range(g * GROUP, g * GROUP + GROUP, 16):
                largest = vmax(largest, vabs(load(xr, j)))
            top = max_lanes(largest)
            inverse = splat(np.float32(127) / top if top > 0 else np.float32(0))
            total = splat_i32(np.int32(0))
            for j in range(g * GROUP, g * GROUP + GROUP, 16):
                q = round_to_i32(mul(load(xr, j), inverse))
                store_i8(qr, j, q)
                total = add_i32(total, q)
            xs[row * groups + g] = top / np.float32(127)
            xz[row * groups + g] = np.int32(-128) * sum_lanes_i32(total)


def round_rows(x: f32p, xb: u16p, k: int, stride: int, begin, end, thread):
    """Rows of x to bfloat16; k is a multiple of 16."""
    for row in range(begin, end):
        xr, br = offset(x, row * stride), offset(xb, row * k)
        for j in range(0, k, 16):
            store_bf16(br, j, load(xr, j))


# --- weights ----------------------------------------------------------------------------------------------


def pack_words(source: i32p, packed: i32p, n: int, words: int, flip: int, begin, end, thread):
    """Rows of 32-bit words to blocks of 16 rows, [N][words] -> [N/16][words][16]; missing rows are 0."""
    for block in range(begin, end):
        out = offset(packed, block * words * 16)
        for r in range(16):
            if block * 16 + r < n:
                row = offset(source, (block * 16 + r) * words)
                for j in range(words):
                    out[j * 16 + r] = np.int32(row[j] ^ np.int32(flip))
            else:
                for j in range(words):
                    out[j * 16 + r] = np.int32(flip)


def pack_halves(source: u16p, packed: u16p, n: int, k: int, begin, end, thread):
    """Rows of 16-bit values to blocks of 16 rows, [N][K] -> [N/16][K][16]; missing rows are 0."""
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


@inline
def load_source(source, index):
    if FORMAT == FLOAT32:
        return load(as_f32p(source), index)
    if FORMAT == FLOAT16:
        return load_f16(as_u16p(source), index)
    return load_bf16(as_u16p(source), index)


def quantize_pack(
    source: u8p, packed: i32p, scales: u16p, scratch: i8p, failed: i32p, n: int, k: int, begin, end, thread
):
    """Rows of floating point to blocks of int8 groups with float16 scales, as `quant.q8.quantize_q8` does.

    `failed` becomes 1 if a weight is NaN or infinite, 2 if one is too large for a float16 scale.
    """
    groups, flip = k // GROUP, np.int32(-0x7F7F7F80)
    values = offset(scratch, thread * GROUP)
    words = as_i32p(values)
    for block in range(begin, end):
        out = offset(packed, block * k * 4)
        for r in range(16):
            row = block * 16 + r
            for g in range(groups):
                at = (block * groups + g) * 16 + r
                if row >= n:
                    scales[at] = np.uint16(0)
                    for j in range(GROUP // 4):
                        out[(g * GROUP // 4 + j) * 16 + r] = flip
                    continue
                first = row * k + g * GROUP
                largest, poison = zeros(), zeros()
                for j in range(0, GROUP, 16):
                    v = load_source(source, first + j)
                    largest, poison = vmax(largest, vabs(v)), fma(v, zeros(), poison)
                top, check = max_lanes(largest), sum_lanes(poison)
                if not check == np.float32(0):
                    failed[0] = np.int32(1)
                elif top > np.float32(127 * 65504):
                    failed[0] = np.int32(2)
                half = float_to_half(top / np.float32(127))
                if half_to_float(half) * np.float32(127.5) < top:
                    half = np.uint16(half + np.uint16(1))
                scale = half_to_float(half)
                divisor = splat(scale if scale > np.float32(0) else np.float32(1))
                for j in range(0, GROUP, 16):
                    store_i8(values, j, round_to_i32(div(load_source(source, first + j), divisor)))
                scales[at] = half
                for j in range(GROUP // 4):
                    out[(g * GROUP // 4 + j) * 16 + r] = np.int32(words[j] ^ flip)
