"""The CPU kernels of `rope`."""

from kuiperllm.backends.cpu.simd import f32p, fma, i32p, load, mul, offset, store, sub
from kuiperllm.backends.cpu.unroll import inline

LANES = 16


@inline
def table_row(cos_sin, stride, position, positions):
    return offset(cos_sin, min(max(position, 0), positions - 1) * stride)


def rope_split(
    x: f32p, positions: i32p, cos_sin: f32p, heads: int, half: int, table_size: int,
    token_stride: int, head_stride: int, table_stride: int, begin, end, thread,
):  # fmt: skip
    whole = half & -LANES
    for token in range(begin, end):
        cos = table_row(cos_sin, table_stride, positions[token], table_size)
        sin = offset(cos, half)
        for head in range(heads):
            first = offset(x, token * token_stride + head * head_stride)
            second = offset(first, half)
            for i in range(0, whole, LANES):
                a, b = load(first, i), load(second, i)
                c, s = load(cos, i), load(sin, i)
                store(first, i, sub(mul(a, c), mul(b, s)))
                store(second, i, fma(a, s, mul(b, c)))
            for i in range(whole, half):
                lone_a, lone_b = first[i], second[i]
                first[i] = lone_a * cos[i] - lone_b * sin[i]
                second[i] = lone_a * sin[i] + lone_b * cos[i]


def rope_interleaved(
    x: f32p, positions: i32p, cos_sin: f32p, heads: int, half: int, table_size: int,
    token_stride: int, head_stride: int, table_stride: int, begin, end, thread,
):  # fmt: skip
    for token in range(begin, end):
        cos = table_row(cos_sin, table_stride, positions[token], table_size)
        sin = offset(cos, half)
        for head in range(heads):
            pairs = offset(x, token * token_stride + head * head_stride)
            for i in range(half):
                a, b = pairs[2 * i], pairs[2 * i + 1]
                pairs[2 * i] = a * cos[i] - b * sin[i]
                pairs[2 * i + 1] = a * sin[i] + b * cos[i]
