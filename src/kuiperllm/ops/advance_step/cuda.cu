// CUDA kernel of `advance_step`: one block, so that all sequences see the same step.
#include "advance.cuh"

extern "C" __global__ void __launch_bounds__(256)
advance_step(const int* tokens, int* input_ids, int* positions, int* seq_lens, long long* slot_mapping, const int* block_table,
             int* history, int* step, int sequences, int width, long long table_stride, int block_size, int rows,
             long long history_stride) {
    launch_next();
    wait_for_previous();
    BatchState state = {input_ids, positions, seq_lens, slot_mapping, block_table, history, step,
                        width, table_stride, block_size, rows, history_stride};
    int now = *step;
    for (int s = threadIdx.x; s < sequences; s += blockDim.x) state.advance(s, tokens[s], state.next(s, now));
    __syncthreads();
    if (threadIdx.x == 0) state.count_step(now);
}
