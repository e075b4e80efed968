// CUDA kernel of `greedy_step`: `argmax`, whose last block goes on to advance the batch.
#include "ops/advance_step/advance.cuh"
#include "ops/argmax/rows.cuh"

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
greedy_step(const float* logits, u64* winners, int* input_ids, int* positions, int* seq_lens, long long* slot_mapping,
            const int* block_table, int* history, int* step, int sequences, int vocabulary, long long stride,
            int blocks_of_row, int width, long long table_stride, int block_size, int rows, long long history_stride) {
    launch_next();
    wait_for_previous();
    BatchState state = {input_ids, positions, seq_lens, slot_mapping, block_table, history, step,
                        width, table_stride, block_size, rows, history_stride};
    int now = *step;
    auto advance = [&](int sequence, int token) { state.advance(sequence, token, state.next(sequence, now)); };
    bool is_last = argmax_of_rows(logits, winners, sequences, vocabulary, stride, blocks_of_row, advance);
    if (is_last && threadIdx.x == 0) state.count_step(now);  // which all threads read before their blocks arrived
}
