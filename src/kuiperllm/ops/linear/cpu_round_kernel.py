"""CPU kernels that round the rows of x before they are multiplied: to int8 groups, or to bfloat16."""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add_i32,
    as_f32p,
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
    store_i8,
    sum_lanes,
    sum_lanes_i32,
    u16p,
    vabs,
    vmax,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline

# Template parameters.
GROUP = 64  # columns whose weights share a scale
ORDERED = False  # the columns of W are stored in another order

STEPS = 127 * 255  # of a row's unit that its largest element is
TINIEST = 1e-30  # rows below have no unit that float32 could hold


@inline
def load_x(x, columns, j, width):
    """16 elements of a row as W has its columns; zeros behind its end."""
    if j >= width:
        return zeros()
    if ORDERED:
        return gather(x, load_i32(columns, j))
    return load(x, j)


def round_to_int8(
    x: f32p, columns: i32p, xq: i8p, xm: i32p, xz: i32p, xs: f32p,
    width: int, stride: int, factor: int, weighted: int, begin, end, thread,
):  # fmt: skip
    """Rows of x to int8, x = xs * xm * xq: a unit for each row, a multiplier for each group.

    Groups have GROUP columns, 32 if that is less; multipliers are from 1 to 255. `width` is a multiple of 16;
    the rows of xq are padded with zeros to a multiple of 32. xz is, for each GROUP columns, `factor` times
    the sum of xq, also times the multiplier if `weighted`.
    """
    k = (width + 31) // 32 * 32
    size = max(GROUP, 32)
    for row in range(begin, end):
        xr, qr = offset(x, row * stride), offset(xq, row * k)
        multipliers = offset(xm, row * (k // size))
        tops = as_f32p(multipliers)
        largest, poison = np.float32(0), zeros()
        for g in range(k // size):
            top = zeros()
            for j in range(g * size, g * size + size, 16):
                v = load_x(xr, columns, j, width)
                top, poison = vmax(vabs(v), top), fma(v, zeros(), poison)
            tops[g] = max_lanes(top)
            largest = max(largest, tops[g])
        unit = largest / np.float32(STEPS) if largest > np.float32(TINIEST) else np.float32(0)
        for g in range(k // size):
            multiplier = np.int32(1)
            if unit > 0:
                wanted = tops[g] / (np.float32(127) * unit)
                multiplier = np.int32(wanted)
                if np.float32(multiplier) < wanted:
                    multiplier += np.int32(1)
                multiplier = min(max(multiplier, np.int32(1)), np.int32(255))
            multipliers[g] = multiplier
            scale = unit * np.float32(multiplier)
            inverse = splat(np.float32(1) / scale if unit > 0 else np.float32(0))
            for part in range(g * size, g * size + size, GROUP):
                total = splat_i32(np.int32(0))
                for j in range(part, part + GROUP, 16):
                    q = round_to_i32(mul(load_x(xr, columns, j, width), inverse))
                    store_i8(qr, j, q)
                    total = add_i32(total, q)
                value = np.int32(factor) * sum_lanes_i32(total)
                xz[row * (k // GROUP) + part // GROUP] = value * multiplier if weighted else value
        xs[row] = unit + sum_lanes(poison)  # NaN if an element is NaN or infinite


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
            store(to, row * k + j, load_x(offset(x, row * stride), columns, j, width))
