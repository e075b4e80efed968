"""CPU kernels of the linear operator for AMX: bfloat16 matrix tiles, for several rows of x.

The layout of weights is the one of `cpu_kernel.py`: a bfloat16 block [K/2][16][2] is a stack of AMX tiles (16
pairs of rows of W^T by 16 columns) as it stands, and int8 groups are expanded to such a panel on the way.
x is rounded to bfloat16 and laid out in tiles [M/16][K/32][16][32], because rows a power of two apart would
share one set of the cache. Two by two tiles of sums stay in registers.
"""

import numpy as np

from kuiperllm.backends.cpu.amx import (
    tile_configure,
    tile_dot_bf16,
    tile_load,
    tile_release,
    tile_store,
    tile_zero,
)
from kuiperllm.backends.cpu.simd import (
    add,
    as_f32p,
    as_u16p,
    f32p,
    fma,
    load,
    load_i32,
    mul,
    offset,
    pair_bf16,
    splat,
    store_bf16,
    store_i32,
    to_f32,
    u8p,
    u16p,
    unsigned_byte,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline
from kuiperllm.ops.linear.cpu_kernel import load_scale, start_value, write

# Template parameters.
GROUP = 64  # q8: weights that share a scale; 0: the weights are bfloat16
HALF_SCALES = True  # q8: scales are float16, else float32
BIAS = False
ACCUMULATE = False  # add to what y holds

SLICE = 512  # columns of W that a pass over x works on


def tile_rows(x: f32p, tiles: u16p, m: int, k: int, stride: int, begin, end, thread):
    """Rows of x to bfloat16 tiles; k is a multiple of 32. Rows that are missing in the last tile are 0."""
    for row in range(begin, end):
        to = offset(tiles, row // 16 * 16 * k + row % 16 * 32)
        if row < m:
            xr = offset(x, row * stride)
            for j in range(0, k, 32):
                store_bf16(to, j * 16, load(xr, j))
                store_bf16(to, j * 16 + 16, load(xr, j + 16))
        else:
            for j in range(0, k, 32):
                store_bf16(to, j * 16, zeros())
                store_bf16(to, j * 16 + 16, zeros())


@inline
def expand(w, scales, panel, block, k, k0, k1):
    """Columns k0 to k1 of a block of int8 groups as bfloat16 pairs."""
    groups = k // GROUP
    for g in range(k0 // GROUP, k1 // GROUP):
        scale = load_scale(scales, (block * groups + g) * 16)
        zero = mul(scale, splat(np.float32(-128)))
        for j in range(g * GROUP, g * GROUP + GROUP, 4):
            quad = load_i32(w, block * k * 16 + j * 16)
            v0 = fma(to_f32(unsigned_byte(quad, np.int32(0))), scale, zero)
            v1 = fma(to_f32(unsigned_byte(quad, np.int32(8))), scale, zero)
            v2 = fma(to_f32(unsigned_byte(quad, np.int32(16))), scale, zero)
            v3 = fma(to_f32(unsigned_byte(quad, np.int32(24))), scale, zero)
            store_i32(panel, (j - k0) * 16, pair_bf16(v0, v1))
            store_i32(panel, (j - k0) * 16 + 32, pair_bf16(v2, v3))


def gemm_amx(
    w: u8p, scales: f32p, tiles: u16p, bias: f32p, y: f32p, scratch: u8p, config: u8p,
    m: int, n: int, k: int, stride: int, scratch_bytes: int, begin, end, thread,
):  # fmt: skip
    """k is a multiple of 32 and of GROUP; `tiles` holds an even number of tiles of 16 rows."""
    tile_configure(config)
    last = (n + 15) // 16 - 1
    row_tiles = (m + 31) // 32 * 2
    panel = as_u16p(offset(scratch, thread * scratch_bytes))
    all_sums = as_f32p(offset(panel, 2 * SLICE * 16))
    for k0 in range(0, k, SLICE):
        k1 = min(k0 + SLICE, k)
        for pair in range(begin, end):
            b0, b1 = 2 * pair, min(2 * pair + 1, last)
            if GROUP > 0:
                p0, p1 = panel, offset(panel, SLICE * 16)
                expand(w, scales, p0, b0, k, k0, k1)
                expand(w, scales, p1, b1, k, k0, k1)
            else:
                p0 = offset(as_u16p(w), (b0 * k + k0) * 16)
                p1 = offset(as_u16p(w), (b1 * k + k0) * 16)
            for t in range(0, row_tiles, 2):
                sums = offset(all_sums, ((pair - begin) * row_tiles + t) * 512)
                if k0 == 0:
                    tile_zero(0)
                    tile_zero(1)
                    tile_zero(2)
                    tile_zero(3)
                else:
                    tile_load(0, sums, 0, 64)
                    tile_load(1, sums, 256, 64)
                    tile_load(2, sums, 512, 64)
                    tile_load(3, sums, 768, 64)
                for j in range(k0, k1, 32):
                    tile_load(4, tiles, (t * k + j) * 16, 64)
                    tile_load(6, p0, (j - k0) * 16, 64)
                    tile_dot_bf16(0, 4, 6)
                    tile_load(7, p1, (j - k0) * 16, 64)
                    tile_dot_bf16(1, 4, 7)
                    tile_load(5, tiles, ((t + 1) * k + j) * 16, 64)
                    tile_dot_bf16(2, 5, 6)
                    tile_dot_bf16(3, 5, 7)
                tile_store(0, sums, 0, 64)
                tile_store(1, sums, 256, 64)
                tile_store(2, sums, 512, 64)
                tile_store(3, sums, 768, 64)
                if k1 == k:
                    for row in range(t * 16, min(t * 16 + 32, m)):
                        yr = offset(y, row * stride)
                        at = (row - t * 16) // 16 * 512 + row % 16 * 16
                        write(yr, b0 * 16, n, add(load(sums, at), start_value(bias, yr, b0 * 16, n)))
                        if b1 > b0:
                            write(
                                yr, b1 * 16, n, add(load(sums, at + 256), start_value(bias, yr, b1 * 16, n))
                            )
    tile_release()
