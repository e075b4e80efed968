"""The CPU kernel of `bias_logits`."""

import numpy as np

from kuiperllm.backends.cpu.simd import f32p, i32p


def bias_logits(
    logits: f32p, token_ids: i32p, rows: i32p, values: f32p, sequences: int, vocabulary: int, stride: int,
    begin, end, thread,
):  # fmt: skip
    for i in range(begin, end):
        row, token = np.int64(rows[i]), token_ids[i]
        if 0 <= row < sequences and 0 <= token < vocabulary:
            logits[row * stride + token] += values[i]
