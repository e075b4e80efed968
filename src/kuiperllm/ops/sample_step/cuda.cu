// CUDA kernel of `sample_step`: the draw of `sample`, behind which each row's last block advances its sequence.
#include "ops/advance_step/advance.cuh"
#include "ops/sample/sampling.cuh"

__device__ unsigned finished;  // rows of the present launch; launches of one device follow one another

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
sample_step(const float* logits, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps,
            const long long* seeds, RowState* states, int* input_ids, int* positions, int* seq_lens, long long* slot_mapping,
            const int* block_table, int* history, int* step, int sequences, int vocabulary, long long stride, int blocks_of_row,
            int width, long long table_stride, int block_size, int rows, long long history_stride) {
    launch_next();
    wait_for_previous();
    BatchState state = {input_ids, positions, seq_lens, slot_mapping, block_table, history, step,
                        width, table_stride, block_size, rows, history_stride};
    const int sequence = blockIdx.x / blocks_of_row;
    BatchState::Next next = {};
    int token = draw(logits, temperatures, top_ks, top_ps, min_ps, seeds, seq_lens, states, vocabulary, stride, blocks_of_row, [&] {
        if (threadIdx.x == 0) next = state.next(sequence);
    });
    if (token < 0 || threadIdx.x > 0) return;
    state.advance(sequence, token, next);
    if (atomicAdd(&finished, 1u) == sequences - 1) {
        finished = 0;
        state.count_step(next.now);  // which all blocks that needed it have read before they arrived
    }
}
