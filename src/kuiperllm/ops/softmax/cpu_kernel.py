"""The CPU kernel of `softmax`."""

import numpy as np

from kuiperllm.backends.cpu.rowwise import NEGATIVE_INFINITY, largest, load_or
from kuiperllm.backends.cpu.simd import (
    add,
    exp,
    f32p,
    load,
    load_first,
    mul,
    offset,
    splat,
    store,
    store_first,
    sub,
    sum_lanes,
    zeros,
)

LANES = 16


def softmax(x: f32p, out: f32p, width: int, x_stride: int, out_stride: int, begin, end, thread):
    whole = width & -LANES
    rest = width - whole
    for row in range(begin, end):
        source, to = offset(x, row * x_stride), offset(out, row * out_stride)
        best = splat(largest(source, width))
        total = zeros()
        for i in range(0, whole, LANES):
            power = exp(sub(load(source, i), best))
            store(to, i, power)
            total = add(total, power)
        if rest > 0:
            power = exp(sub(load_or(source, whole, width, NEGATIVE_INFINITY), best))
            store_first(to, whole, power, rest)
            total = add(total, power)
        scale = splat(np.float32(1) / sum_lanes(total))
        for i in range(0, whole, LANES):
            store(to, i, mul(load(to, i), scale))
        if rest > 0:
            store_first(to, whole, mul(load_first(to, whole, rest), scale), rest)
