"""CPU kernels that multiply in floating point: weights in blocks of 16 rows, and e4m3 codes.

A block holds 16 rows of W side by side, so that one vector is 16 outputs and nothing is summed across lanes:

    float32, float16   [N/16][K][16]
    bfloat16           [N/16][K/2][16][2]    pairs, as the bfloat16 dot product wants them

`gemv_*` is for one row of x (decode): it streams W once, block by block. `gemm_*` is for more: a tile of
ROWS x 2 blocks stays in registers, the two blocks in the cache; e4m3 codes are expanded to a panel of such
blocks first (see `cpu_codes_kernel.py`). Work items are blocks of `gemv_*` and pairs of blocks of `gemm_*`.
"""

from kuiperllm.backends.cpu.simd import (
    add,
    as_f32p,
    as_u16p,
    broadcast,
    broadcast_4bytes,
    dot2_bf16,
    even_bf16,
    f32p,
    fma,
    load,
    load_f16,
    load_first,
    load_i32,
    odd_bf16,
    offset,
    prefetch,
    u8p,
    u16p,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline, registers, unroll
from kuiperllm.ops.linear.cpu_codes_kernel import (
    GROUP,
    block_at,
    chunk_at,
    expand_weights,
    load_number,
    number_of,
    record_at,
)
from kuiperllm.ops.linear.cpu_output_kernel import start_value, write

# Template parameters. Of codes: those of their scheme as well.
FORMAT = 0  # FLOAT32, FLOAT16, BFLOAT16 or CODES
ROWS = 6  # rows of x in a register tile
SLICE = 2048  # columns of W that a pass over x works on

FLOAT32, FLOAT16, BFLOAT16, CODES = 0, 1, 2, 3
AHEAD = 4096  # bytes that weights are fetched ahead


# --- one row ----------------------------------------------------------------------------------------------


def gemv_float(
    w: u8p, x: f32p, bias: f32p, y: f32p, n: int, k: int, has_bias: int, accumulate: int, begin, end, thread
):
    size = k * 64 if FORMAT == FLOAT32 else k * 32 if FORMAT == FLOAT16 else (k + 1) // 2 * 64
    for block in range(begin, end):
        wb = offset(w, block * size)
        even, odd = start_value(bias, y, block * 16, n, has_bias, accumulate), zeros()
        for i in range(0, k - 1, 2):
            xe, xo = broadcast(x, i), broadcast(x, i + 1)
            if FORMAT == FLOAT32:
                prefetch(wb, i * 64 + AHEAD)
                prefetch(wb, i * 64 + 64 + AHEAD)
                even = fma(load(as_f32p(wb), i * 16), xe, even)
                odd = fma(load(as_f32p(wb), i * 16 + 16), xo, odd)
            else:
                prefetch(wb, i * 32 + AHEAD)
                if FORMAT == FLOAT16:
                    even = fma(load_f16(as_u16p(wb), i * 16), xe, even)
                    odd = fma(load_f16(as_u16p(wb), i * 16 + 16), xo, odd)
                else:
                    pairs = load_i32(wb, i * 32)
                    even = fma(even_bf16(pairs), xe, even)
                    odd = fma(odd_bf16(pairs), xo, odd)
        if k % 2:
            even = fma(one_column(wb, k - 1), broadcast(x, k - 1), even)
        write(y, block * 16, n, add(even, odd))


@inline
def one_column(w, j):
    """Column j of a block; j is even."""
    if FORMAT == FLOAT16:
        return load_f16(as_u16p(w), j * 16)
    if FORMAT == BFLOAT16:
        return even_bf16(load_i32(w, j * 32))
    return load(as_f32p(w), j * 16)


def gemv_e4m3(
    w: u8p, x: f32p, bias: f32p, y: f32p, n: int, k: int, has_bias: int, accumulate: int,
    begin, end, thread,
):  # fmt: skip
    for block in range(begin, end):
        wb = offset(w, block_at(block, k))
        out = start_value(bias, y, block * 16, n, has_bias, accumulate)
        for g in range(k // GROUP):
            first, quads = g * GROUP, offset(wb, chunk_at(g * GROUP))
            part = registers(4)
            for c in unroll(4):
                part[c] = zeros()
            for j in range(0, GROUP, 4):
                prefetch(quads, j * 16 + AHEAD)
                codes = load_i32(quads, j * 16)
                for c in unroll(4):
                    part[c] = fma(number_of(codes, c), broadcast(x, first + j + c), part[c])
            total = add(add(part[0], part[1]), add(part[2], part[3]))
            out = fma(total, load_number(wb, record_at(g)), out)
        write(y, block * 16, n, out)


# --- several rows -----------------------------------------------------------------------------------------


@inline
def partial_sum(bias, y, column, n, first, has_bias, accumulate):
    """What the sums of 16 outputs go on from, in the first slice of columns and later."""
    if first:
        return start_value(bias, y, column, n, has_bias, accumulate)
    return load_first(y, column, n - column)


def gemm_float(
    w: u8p, x: f32p, bias: f32p, y: f32p, scratch: f32p,
    m: int, n: int, k: int, x_stride: int, stride: int, has_bias: int, accumulate: int, begin, end, thread,
):  # fmt: skip
    """`scratch` has 2 * SLICE * 16 elements for each thread if the weights are codes."""
    last = (n + 15) // 16 - 1
    size = k * 64 if FORMAT == FLOAT32 else k * 32 if FORMAT == FLOAT16 else (k + 1) // 2 * 64
    for k0 in range(0, k, SLICE):
        k1 = min(k0 + SLICE, k)
        for pair in range(begin, end):
            b0, b1 = 2 * pair, min(2 * pair + 1, last)
            w0, w1 = offset(w, b0 * size), offset(w, b1 * size)
            if FORMAT == CODES:
                p0 = offset(scratch, thread * 2 * SLICE * 16)
                p1 = offset(p0, SLICE * 16)
                expand_weights(w, p0, b0, k, k0, k1)
                expand_weights(w, p1, b1, k, k0, k1)
            for row in range(0, m, ROWS):
                xr, yr, out = registers(ROWS), registers(ROWS), registers(ROWS, 2)
                for r in unroll(ROWS):
                    i = min(row + r, m - 1)
                    xr[r], yr[r] = offset(x, i * x_stride), offset(y, i * stride)
                    out[r, 0] = partial_sum(bias, yr[r], b0 * 16, n, k0 == 0, has_bias, accumulate)
                    out[r, 1] = partial_sum(bias, yr[r], b1 * 16, n, k0 == 0, has_bias, accumulate)
                if FORMAT == BFLOAT16:
                    for j in range(k0, k1 - 1, 2):
                        pairs0, pairs1 = load_i32(w0, j * 32), load_i32(w1, j * 32)
                        e0, e1 = even_bf16(pairs0), even_bf16(pairs1)
                        o0, o1 = odd_bf16(pairs0), odd_bf16(pairs1)
                        for r in unroll(ROWS):
                            v = broadcast(xr[r], j)
                            out[r, 0] = fma(e0, v, out[r, 0])
                            out[r, 1] = fma(e1, v, out[r, 1])
                        for r in unroll(ROWS):
                            v = broadcast(xr[r], j + 1)
                            out[r, 0] = fma(o0, v, out[r, 0])
                            out[r, 1] = fma(o1, v, out[r, 1])
                for j in range(k1 - (k1 - k0) % 2 if FORMAT == BFLOAT16 else k0, k1):
                    if FORMAT == CODES:
                        e0, e1 = load(p0, (j - k0) * 16), load(p1, (j - k0) * 16)
                    else:
                        e0, e1 = one_column(w0, j), one_column(w1, j)
                    for r in unroll(ROWS):
                        v = broadcast(xr[r], j)
                        out[r, 0] = fma(e0, v, out[r, 0])
                        out[r, 1] = fma(e1, v, out[r, 1])
                for r in unroll(ROWS):
                    if row + r < m:
                        write(yr[r], b0 * 16, n, out[r, 0])
                        if b1 > b0:
                            write(yr[r], b1 * 16, n, out[r, 1])


def gemm_bf16(
    w: u8p, xb: u16p, bias: f32p, y: f32p, scratch: u16p,
    m: int, n: int, k: int, stride: int, has_bias: int, accumulate: int, begin, end, thread,
):  # fmt: skip
    """By the dot product of bfloat16 pairs; xb holds rows of k, which is even. `scratch`: as `gemm_float`."""
    last = (n + 15) // 16 - 1
    for k0 in range(0, k, SLICE):
        k1 = min(k0 + SLICE, k)
        for pair in range(begin, end):
            b0, b1 = 2 * pair, min(2 * pair + 1, last)
            w0, w1 = offset(as_u16p(w), (b0 * k + k0) * 16), offset(as_u16p(w), (b1 * k + k0) * 16)
            if FORMAT == CODES:
                w0 = offset(scratch, thread * 2 * SLICE * 16)
                w1 = offset(w0, SLICE * 16)
                expand_weights(w, w0, b0, k, k0, k1)
                expand_weights(w, w1, b1, k, k0, k1)
            for row in range(0, m, ROWS):
                xr, yr, out = registers(ROWS), registers(ROWS), registers(ROWS, 2)
                for r in unroll(ROWS):
                    i = min(row + r, m - 1)
                    xr[r], yr[r] = offset(xb, i * k + k0), offset(y, i * stride)
                    out[r, 0] = partial_sum(bias, yr[r], b0 * 16, n, k0 == 0, has_bias, accumulate)
                    out[r, 1] = partial_sum(bias, yr[r], b1 * 16, n, k0 == 0, has_bias, accumulate)
                for j in range(0, k1 - k0, 2):
                    pairs0, pairs1 = load_i32(w0, j * 16), load_i32(w1, j * 16)
                    for r in unroll(ROWS):
                        v = broadcast_4bytes(xr[r], j)
                        out[r, 0] = dot2_bf16(out[r, 0], v, pairs0)
                        out[r, 1] = dot2_bf16(out[r, 1], v, pairs1)
                for r in unroll(ROWS):
                    if row + r < m:
                        write(yr[r], b0 * 16, n, out[r, 0])
                        if b1 > b0:
                            write(yr[r], b1 * 16, n, out[r, 1])
