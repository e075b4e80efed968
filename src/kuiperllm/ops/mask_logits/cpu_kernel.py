"""The CPU kernel of `mask_logits`."""

from kuiperllm.backends.cpu.rowwise import NEGATIVE_INFINITY
from kuiperllm.backends.cpu.simd import f32p, i32p, offset


def mask_logits(
    logits: f32p, bits: i32p, vocabulary: int, stride: int, bits_stride: int, begin, end, thread
):  # fmt: skip
    for row in range(begin, end):
        x, words = offset(logits, row * stride), offset(bits, row * bits_stride)
        for start in range(0, vocabulary, 32):
            word = words[start // 32]
            if word == -1:
                continue
            for v in range(start, min(start + 32, vocabulary)):
                if (word >> (v - start)) & 1 == 0:
                    x[v] = NEGATIVE_INFINITY
