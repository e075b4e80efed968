"""The CPU kernels of `rms_norm`. Four sums run side by side to hide the latency of adding."""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add,
    f32p,
    fma,
    load,
    mul,
    offset,
    splat,
    sqrt,
    store,
    sum_lanes,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline, registers, unroll

LANES = 16
STEP = 64


@inline
def sum_of_squares(x, width):
    total = registers(4)
    for k in unroll(4):
        total[k] = zeros()
    blocks = width & -STEP
    for i in range(0, blocks, STEP):
        for k in unroll(4):
            v = load(x, i + LANES * k)
            total[k] = fma(v, v, total[k])
    whole = width & -LANES
    for i in range(blocks, whole, LANES):
        v = load(x, i)
        total[0] = fma(v, v, total[0])
    result = sum_lanes(add(add(total[0], total[1]), add(total[2], total[3])))
    for i in range(whole, width):
        result += x[i] * x[i]
    return result


@inline
def inverse_rms(x, width, eps):
    return np.float32(1) / sqrt(sum_of_squares(x, width) / np.float32(width) + eps)


@inline
def scale_row(x, weight, out, width, scale):
    factor = splat(scale)
    whole = width & -LANES
    for i in range(0, whole, LANES):
        store(out, i, mul(mul(load(x, i), factor), load(weight, i)))
    for i in range(whole, width):
        out[i] = x[i] * scale * weight[i]


def rms_norm(
    x: f32p, weight: f32p, out: f32p, width: int, eps: float, inner: int,
    x_outer: int, x_inner: int, out_outer: int, out_inner: int, begin, end, thread,
):  # fmt: skip
    for i in range(begin, end):
        row = offset(x, (i // inner) * x_outer + (i % inner) * x_inner)
        to = offset(out, (i // inner) * out_outer + (i % inner) * out_inner)
        scale = inverse_rms(row, width, eps)
        scale_row(row, weight, to, width, scale)


def add_rms_norm(
    residual: f32p, x: f32p, weight: f32p, out: f32p, width: int, eps: float,
    residual_stride: int, x_stride: int, out_stride: int, begin, end, thread,
):  # fmt: skip
    whole = width & -LANES
    for i in range(begin, end):
        kept, row = offset(residual, i * residual_stride), offset(x, i * x_stride)
        to = offset(out, i * out_stride)
        for j in range(0, whole, LANES):
            store(kept, j, add(load(kept, j), load(row, j)))
        for j in range(whole, width):
            kept[j] += row[j]
        scale = inverse_rms(kept, width, eps)
        scale_row(kept, weight, to, width, scale)
