"""CPU kernels of `embedding`: one lane of a block of 16 rows (see `ops/linear/cpu_kernel.py`), spread out."""

import numpy as np

from kuiperllm.backends.cpu.simd import as_f32p, as_u16p, f32p, float_of, half_to_float, i32p, offset, u8p

# Template parameters.
GROUP = 64
HALF_SCALES = True
FORMAT = 0

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2


def embedding_q8(
    ids: i32p, table: u8p, scales: u8p, out: f32p, vocab: int, width: int, stride: int, begin, end, thread
):
    groups = width // GROUP
    for token in range(begin, end):
        row, to = np.int64(ids[token]), offset(out, token * stride)
        if row < 0 or row >= vocab:
            for i in range(width):
                to[i] = np.float32(0)
            continue
        block, lane = row // 16, row % 16
        values, first = offset(table, block * width * 16 + lane * 4), block * groups * 16 + lane
        for g in range(groups):
            if HALF_SCALES:
                scale = half_to_float(as_u16p(scales)[first + g * 16])
            else:
                scale = as_f32p(scales)[first + g * 16]
            for i in range(g * GROUP, g * GROUP + GROUP):
                to[i] = np.float32(np.int32(values[i // 4 * 64 + i % 4]) - np.int32(128)) * scale


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
