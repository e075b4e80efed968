// CUDA kernel of `pick_tokens`: a thread for each token.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
pick_tokens(const int* given, const int* source, const int* newest, int* out, int tokens) {
    launch_next();
    wait_for_previous();
    int t = blockIdx.x * 256 + threadIdx.x;
    if (t < tokens) out[t] = source[t] < 0 ? given[t] : newest[source[t]];
}
