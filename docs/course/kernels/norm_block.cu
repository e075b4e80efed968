// Root mean square norm: a block of WARPS warps for each row.
#include "common.cuh"

extern "C" __global__ void norm_block(const float* x, const float* weight, float* out, int width, float eps) {
    __shared__ float scratch[WARPS];
    wait_for_previous();
    const float* from = x + blockIdx.x * width;
    float* to = out + blockIdx.x * width;
    float squares = 0.f;
    for (int i = threadIdx.x; i < width; i += 32 * WARPS) squares += from[i] * from[i];
    squares = block_reduce<WARPS>(squares, 0.f, scratch, Sum());
    float scale = rsqrtf(squares / width + eps);
    for (int i = threadIdx.x; i < width; i += 32 * WARPS) to[i] = from[i] * scale * weight[i];
}
