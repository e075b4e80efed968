"""CPU kernels that round the rows of x before they are multiplied: to int8 groups, or to bfloat16.

What is rounded to int8 groups can be normalized on the way (Zhang and Sennrich 2019, arXiv:1910.07467).
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add_i32,
    as_u16p,
    f32p,
    fma,
    gather,
    i8p,
    i32p,
    load,
    load_i32,
    max_lanes,
    mul,
    offset,
    round_to_i32,
    splat,
    splat_i32,
    store,
    store_bf16,
    store_quads,
    sum_lanes,
    sum_lanes_i32,
    u16p,
    vabs,
    vmax,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline
from kuiperllm.ops.rms_norm.cpu_kernel import inverse_rms

# Template parameters.
GROUP = 64  # columns whose weights share a scale
XGROUP = 64  # columns of x that share one
PAIRS = False  # sums are pairs of int16
ORDERED = False  # the columns of W are stored in another order
NORM = False  # rows are normalized first

TINIEST = 1e-30  # groups of x that reach no further are zeros


@inline
def load_columns(x, columns, j):
    """16 elements as W has its columns."""
    if ORDERED:
        return gather(x, load_i32(columns, j))
    return load(x, j)


@inline
def load_x(x, columns, norm, factor, j, width):
    """16 elements of a row as they are to be multiplied; zeros behind its end."""
    if j >= width:
        return zeros()
    if NORM:
        return mul(mul(load_columns(x, columns, j), factor), load_columns(norm, columns, j))
    return load_columns(x, columns, j)


def round_to_int8(
    x: f32p, columns: i32p, norm: f32p, xq: i8p, xs: f32p, xz: i32p, m: int, width: int, stride: int,
    rows: int, middle: int, eps: float, begin, end, thread,
):  # fmt: skip
    """m rows of x to int8 groups: values xq, scales xs, and xz, `middle` times the sum of each GROUP columns.

    Tiles of `rows` rows lie side by side: xq is [tiles][k/4][rows][4], xs [tiles][k/XGROUP][rows] and xz
    [tiles][k/GROUP][rows], as PAIRS [tiles][k/GROUP/2][rows][2], where k is `width`, a multiple of 16,
    rounded up to a multiple of 32. Columns and rows that are missing are zeros.
    """
    k = (width + 31) // 32 * 32
    for row in range(begin, end):
        tile, r = row // rows, row % rows
        xr, quads = offset(x, row * stride), offset(xq, tile * k * rows + r * 4)
        scales = offset(xs, tile * (k // XGROUP) * rows + r)
        sums = offset(xz, tile * (k // GROUP // (2 if PAIRS else 1)) * rows + r)
        known, factor = width if row < m else 0, zeros()
        if NORM and row < m:
            factor = splat(inverse_rms(xr, width, eps))
        for first in range(0, k, XGROUP):
            top, poison = zeros(), zeros()
            for j in range(first, first + XGROUP, 16):
                v = load_x(xr, columns, norm, factor, j, known)
                top, poison = vmax(vabs(v), top), fma(v, zeros(), poison)
            largest = max_lanes(top)
            inverse = splat(np.float32(127) / largest if largest > np.float32(TINIEST) else np.float32(0))
            # NaN if an element is NaN or infinite
            scales[first // XGROUP * rows] = largest / np.float32(127) + sum_lanes(poison)
            for g in range(first // GROUP, (first + XGROUP) // GROUP):
                total = splat_i32(np.int32(0))
                for j in range(g * GROUP, g * GROUP + GROUP, 16):
                    q = round_to_i32(mul(load_x(xr, columns, norm, factor, j, known), inverse))
                    store_quads(quads, j * rows, q, rows * 4)
                    total = add_i32(total, q)
                value = np.int32(middle) * sum_lanes_i32(total)
                if PAIRS:  # groups 0 and 2, 1 and 3 of every four, as `pair_of_minimums` has them
                    pair = g // 4 * 2 + g % 2
                    as_u16p(sums)[pair * rows * 2 + g % 4 // 2] = np.uint16(value & 0xFFFF)
                else:
                    sums[g * rows] = value


def round_rows(x: f32p, xb: u16p, k: int, stride: int, begin, end, thread):
    """Rows of x to bfloat16; k is a multiple of 16."""
    for row in range(begin, end):
        xr, br = offset(x, row * stride), offset(xb, row * k)
        for j in range(0, k, 16):
            store_bf16(br, j, load(xr, j))


def take_columns(x: f32p, columns: i32p, to: f32p, width: int, k: int, stride: int, begin, end, thread):
    """Rows of x as W has its columns, padded with zeros to k elements; k is a multiple of 16."""
    for row in range(begin, end):
        for j in range(0, k, 16):
            store(to, row * k + j, load_x(offset(x, row * stride), columns, x, zeros(), j, width))
