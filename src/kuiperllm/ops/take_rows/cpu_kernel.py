"""The CPU kernel of `take_rows`."""

import numpy as np

from kuiperllm.backends.cpu.simd import f32p, i32p, offset


def take_rows(
    x: f32p,
    rows: i32p,
    out: f32p,
    tokens: int,
    width: int,
    x_stride: int,
    out_stride: int,
    begin,
    end,
    thread,
):
    for s in range(begin, end):
        row, to = np.int64(rows[s]), offset(out, s * out_stride)
        if row < 0 or row >= tokens:
            for i in range(width):
                to[i] = np.float32(0)
            continue
        source = offset(x, row * x_stride)
        for i in range(width):
            to[i] = source[i]
