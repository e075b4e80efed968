"""The CPU kernel of `penalize`."""

from kuiperllm.backends.cpu.simd import f32p, i32p, offset


def penalize(
    logits: f32p, token_ids: i32p, rows: i32p, output_counts: i32p,
    repetition: f32p, presence: f32p, frequency: f32p, sequences: int, vocabulary: int, stride: int,
    begin, end, thread,
):  # fmt: skip
    for i in range(begin, end):
        row, token, count = rows[i], token_ids[i], output_counts[i]
        if 0 <= row < sequences and 0 <= token < vocabulary:
            x = offset(logits, row * stride)
            value = x[token]
            value = value / repetition[row] if value > 0 else value * repetition[row]
            if count > 0:
                value -= presence[row] + count * frequency[row]
            x[token] = value
