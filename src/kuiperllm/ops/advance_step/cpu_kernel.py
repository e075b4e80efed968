"""The CPU kernel of `advance_step`."""

from kuiperllm.backends.cpu.simd import i32p, i64p


def advance_step(
    tokens: i32p, input_ids: i32p, positions: i32p, seq_lens: i32p, slot_mapping: i64p, block_table: i32p,
    history: i32p, step: i32p, sequences: int, width: int, table_stride: int, block_size: int, rows: int,
    history_stride: int, begin, end, thread,
):  # fmt: skip
    row = (step[0] % rows) * history_stride
    for s in range(sequences):
        if slot_mapping[s] < -1:
            continue
        token, place = tokens[s], positions[s] + 1
        block = place // block_size
        input_ids[s] = token
        positions[s] = place
        seq_lens[s] += 1
        slot = -1
        if block < width:
            slot = block_table[s * table_stride + block] * block_size + place % block_size
        slot_mapping[s] = slot
        history[row + s] = token
    step[0] = (step[0] + 1) & 0x7FFFFFFF
