"""What the speed of a model is held against: how fast this machine reads memory."""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add_i32,
    i32p,
    load_i32,
    offset,
    prefetch,
    splat_i32,
    sum_lanes_i32,
    u8p,
)


def read_memory(memory: u8p, sums: i32p, part_bytes: int, begin, end, thread):
    """Add up parts of memory, 256 bytes at a time; `part_bytes` is a multiple of 256."""
    for part in range(begin, end):
        source = offset(memory, part * part_bytes)
        a = b = c = d = splat_i32(np.int32(0))
        for i in range(0, part_bytes, 256):
            prefetch(source, i + 4096)
            prefetch(source, i + 4160)
            prefetch(source, i + 4224)
            prefetch(source, i + 4288)
            a = add_i32(a, load_i32(source, i))
            b = add_i32(b, load_i32(source, i + 64))
            c = add_i32(c, load_i32(source, i + 128))
            d = add_i32(d, load_i32(source, i + 192))
        sums[part] = sum_lanes_i32(add_i32(add_i32(a, b), add_i32(c, d)))
