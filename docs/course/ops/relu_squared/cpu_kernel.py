"""The CPU kernel of `relu_squared`."""

import numpy as np

from kuiperllm.backends.cpu.simd import f32p, load, mul, offset, store, vmax, zeros

LANES = 16


def relu_squared(x: f32p, out: f32p, width: int, x_stride: int, out_stride: int, begin, end, thread):
    whole = width & -LANES
    for row in range(begin, end):
        source, to = offset(x, row * x_stride), offset(out, row * out_stride)
        for i in range(0, whole, LANES):
            v = vmax(load(source, i), zeros())
            store(to, i, mul(v, v))
        for i in range(whole, width):
            v = max(source[i], np.float32(0))
            to[i] = v * v
