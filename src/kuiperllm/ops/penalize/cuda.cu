// CUDA kernel of `penalize`: a thread for each pair.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
penalize(float* logits, const int* token_ids, const int* rows, const int* output_counts, const float* repetition,
         const float* presence, const float* frequency, int pairs, int sequences, int vocabulary, long long stride) {
    launch_next();
    wait_for_previous();
    int pair = blockIdx.x * 256 + threadIdx.x;
    if (pair >= pairs) return;
    int row = rows[pair], token = token_ids[pair], count = output_counts[pair];
    if (row < 0 || row >= sequences || token < 0 || token >= vocabulary) return;
    float* x = logits + row * stride + token;
    float value = *x > 0.f ? *x / repetition[row] : *x * repetition[row];
    if (count > 0) value -= presence[row] + count * frequency[row];
    *x = value;
}
