"""CPU kernels of the linear operator for AMX: bfloat16 matrix tiles, for several rows of x.

The layout of weights is the one of `cpu_float_kernel.py`: a bfloat16 block [K/2][16][2] is a stack of AMX
tiles (16 pairs of rows of W^T by 16 columns) as it stands, and codes are expanded to such a panel on the way.
x is rounded to bfloat16 and laid out in tiles [M/16][K/32][16][32], because rows a power of two apart would
share one set of the cache. Two by two tiles of sums stay in registers.
"""

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
    load,
    offset,
    store_bf16,
    u8p,
    u16p,
    zeros,
)
from kuiperllm.ops.linear.cpu_codes_kernel import expand_weights
from kuiperllm.ops.linear.cpu_output_kernel import start_value, write

# Template parameters. Of codes: those of their scheme as well.
FORMAT = 2  # BFLOAT16 or CODES
SLICE = 512  # columns of W that a pass over x works on

BFLOAT16, CODES = 2, 3


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


def gemm_amx(
    w: u8p, tiles: u16p, bias: f32p, y: f32p, scratch: u8p, config: u8p,
    m: int, n: int, k: int, stride: int, scratch_bytes: int, has_bias: int, accumulate: int,
    begin, end, thread,
):  # fmt: skip
    """k is a multiple of 32; `tiles` holds an even number of tiles of 16 rows."""
    tile_configure(config)
    last = (n + 15) // 16 - 1
    row_tiles = (m + 31) // 32 * 2
    panel = as_u16p(offset(scratch, thread * scratch_bytes))
    all_sums = as_f32p(offset(panel, 2 * SLICE * 16))
    for k0 in range(0, k, SLICE):
        k1 = min(k0 + SLICE, k)
        for pair in range(begin, end):
            b0, b1 = 2 * pair, min(2 * pair + 1, last)
            if FORMAT == CODES:
                p0, p1 = panel, offset(panel, SLICE * 16)
                expand_weights(w, p0, b0, k, k0, k1)
                expand_weights(w, p1, b1, k, k0, k1)
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
                        before = start_value(bias, yr, b0 * 16, n, has_bias, accumulate)
                        write(yr, b0 * 16, n, add(load(sums, at), before))
                        if b1 > b0:
                            before = start_value(bias, yr, b1 * 16, n, has_bias, accumulate)
                            write(yr, b1 * 16, n, add(load(sums, at + 256), before))
    tile_release()
