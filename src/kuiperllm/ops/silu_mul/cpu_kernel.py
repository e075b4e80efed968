"""The CPU kernel of `silu_mul`."""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add,
    div,
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
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline

LANES = 16


@inline
def gated(gate, up):
    return mul(div(gate, add(splat(np.float32(1)), exp(sub(zeros(), gate)))), up)


def silu_mul(
    gate_up: f32p, out: f32p, width: int, block: int, blocks: int, in_stride: int, out_stride: int,
    begin, end, thread,
):  # fmt: skip
    for item in range(begin, end):
        row, first = item // blocks, (item % blocks) * block
        gate, to = offset(gate_up, row * in_stride), offset(out, row * out_stride)
        up = offset(gate, width)
        last = min(first + block, width)
        whole = first + ((last - first) & -LANES)
        for i in range(first, whole, LANES):
            store(to, i, gated(load(gate, i), load(up, i)))
        if whole < last:
            rest = last - whole
            v = gated(load_first(gate, whole, rest), load_first(up, whole, rest))
            store_first(to, whole, v, rest)
