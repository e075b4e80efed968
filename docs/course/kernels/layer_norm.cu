// LayerNorm: a block of WARPS warps for each row.
#include "common.cuh"

extern "C" __global__ void layer_norm(const float* x, const float* weight, const float* bias, float* out, int width, float eps) {
    __shared__ float scratch[WARPS];
    wait_for_previous();
    const float* from = x + blockIdx.x * width;
    float sum = 0.f, squares = 0.f;
    for (int i = threadIdx.x; i < width; i += 32 * WARPS) sum += from[i];
    float mean = block_reduce<WARPS>(sum, 0.f, scratch, Sum()) / width;
    for (int i = threadIdx.x; i < width; i += 32 * WARPS) squares += (from[i] - mean) * (from[i] - mean);
    __syncthreads();  // everybody has read the first sums
    float scale = rsqrtf(block_reduce<WARPS>(squares, 0.f, scratch, Sum()) / width + eps);
    for (int i = threadIdx.x; i < width; i += 32 * WARPS) {
        out[blockIdx.x * width + i] = (from[i] - mean) * scale * weight[i] + bias[i];
    }
}
