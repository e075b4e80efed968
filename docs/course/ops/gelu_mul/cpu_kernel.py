"""The CPU kernel of `gelu_mul`."""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add,
    div,
    exp,
    f32p,
    fma,
    load,
    load_first,
    mul,
    offset,
    splat,
    store,
    store_first,
)
from kuiperllm.backends.cpu.unroll import inline

LANES = 16
MINUS_TWO_ROOT = np.float32(-1.5957691216057308)  # -2 sqrt(2 / pi)
CUBIC = np.float32(-0.07135481282552228)  # and that times 0.044715


@inline
def gated(gate, up):
    inner = mul(gate, fma(splat(CUBIC), mul(gate, gate), splat(MINUS_TWO_ROOT)))  # -2 z
    return mul(div(gate, add(splat(np.float32(1)), exp(inner))), up)


def gelu_mul(
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
