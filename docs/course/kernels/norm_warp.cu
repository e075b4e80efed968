// Root mean square norm: a warp for each row.
#include "common.cuh"

extern "C" __global__ void norm_warp(const float* x, const float* weight, float* out, int rows, int width, float eps) {
    wait_for_previous();
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;  // the whole warp leaves, never a part of it
    float squares = 0.f;
    for (int i = lane; i < width; i += 32) squares += x[row * width + i] * x[row * width + i];
    squares = warp_sum(squares);
    float scale = rsqrtf(squares / width + eps);
    for (int i = lane; i < width; i += 32) out[row * width + i] = x[row * width + i] * scale * weight[i];
}
