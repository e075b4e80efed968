"""CPU kernels of `embedding`: one lane of a block of 16 rows, spread out.

See `ops/linear/cpu_float_kernel.py` and `ops/linear/cpu_codes_kernel.py` for the blocks.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    as_f32p,
    as_u16p,
    f32p,
    float_of,
    half_to_float,
    i32p,
    offset,
    u8p,
)
from kuiperllm.ops.linear.cpu_codes_kernel import expand_weights

# Template parameters. Of codes: those of their scheme as well.
FORMAT = 0
ORDERED = False  # the columns of the table are stored in another order

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2


def embedding_codes(
    ids: i32p, table: u8p, columns: i32p, out: f32p, scratch: f32p,
    vocab: int, width: int, k: int, stride: int, begin, end, thread,
):  # fmt: skip
    """Rows have k packed columns, of which `width` count; `scratch` has k * 16 elements for each thread."""
    block = offset(scratch, thread * k * 16)
    for token in range(begin, end):
        row, to = np.int64(ids[token]), offset(out, token * stride)
        if row < 0 or row >= vocab:
            for i in range(width):
                to[i] = np.float32(0)
            continue
        expand_weights(table, block, row // 16, k, 0, k)
        for i in range(width):
            if ORDERED:
                to[columns[i]] = block[i * 16 + row % 16]
            else:
                to[i] = block[i * 16 + row % 16]


def embedding_float(
    ids: i32p, table: u8p, out: f32p, vocab: int, width: int, stride: int, begin, end, thread
):
    for token in range(begin, end):
        row, to = np.int64(ids[token]), offset(out, token * stride)
        if row < 0 or row >= vocab:
            for i in range(width):
                to[i] = np.float32(0)
            continue
        block, lane = row // 16, row % 16
        if FORMAT == FLOAT32:
            words = offset(as_f32p(table), block * width * 16 + lane)
            for i in range(width):
                to[i] = words[i * 16]
        elif FORMAT == FLOAT16:
            halves = offset(as_u16p(table), block * width * 16 + lane)
            for i in range(width):
                to[i] = half_to_float(halves[i * 16])
        else:
            pairs = offset(as_u16p(table), block * ((width + 1) // 2) * 32 + lane * 2)
            for i in range(width):
                to[i] = float_of(np.int32(pairs[i // 2 * 32 + i % 2]) << np.int32(16))
