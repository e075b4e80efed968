// Root mean square norm, the smallest version: a thread for each row.
#include "common.cuh"

extern "C" __global__ void norm_thread(const float* x, const float* weight, float* out, int rows, int width, float eps) {
    wait_for_previous();
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float squares = 0.f;
    for (int i = 0; i < width; i++) squares += x[row * width + i] * x[row * width + i];
    float scale = rsqrtf(squares / width + eps);
    for (int i = 0; i < width; i++) out[row * width + i] = x[row * width + i] * scale * weight[i];
}
