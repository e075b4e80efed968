// CUDA kernel of `bias_logits`: a thread for each pair.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
bias_logits(float* logits, const int* token_ids, const int* rows, const float* values, int pairs, int sequences,
            int vocabulary, long long stride) {
    launch_next();
    wait_for_previous();
    int pair = blockIdx.x * 256 + threadIdx.x;
    if (pair >= pairs) return;
    int row = rows[pair], token = token_ids[pair];
    if (row >= 0 && row < sequences && token >= 0 && token < vocabulary) logits[row * stride + token] += values[pair];
}
