// The largest absolute value of each row, over 127: a block of WARPS warps for each row.
#include "common.cuh"

extern "C" __global__ void row_scales(const float* x, float* scales, int width) {
    __shared__ float scratch[WARPS];
    wait_for_previous();
    float largest = 0.f;
    for (int i = threadIdx.x; i < width; i += 32 * WARPS) largest = fmaxf(largest, fabsf(x[blockIdx.x * width + i]));
    largest = block_reduce<WARPS>(largest, 0.f, scratch, Max());
    if (threadIdx.x == 0) scales[blockIdx.x] = largest / 127.f;
}
