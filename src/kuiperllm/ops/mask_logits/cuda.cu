// CUDA kernel of `mask_logits`: a thread for each token of a row.
#include "ops/logits.cuh"

extern "C" __global__ void __launch_bounds__(256)
mask_logits(float* logits, const int* bits, int rows, int vocabulary, long long stride, long long bits_stride) {
    launch_next();
    wait_for_previous();
    int v = blockIdx.x * 256 + threadIdx.x;
    if (v >= vocabulary) return;
    for (int row = blockIdx.y; row < rows; row += gridDim.y)
        if (!(bits[row * bits_stride + v / 32] >> (v % 32) & 1)) logits[row * stride + v] = minus_infinity();
}
