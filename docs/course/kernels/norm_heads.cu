// Root mean square norm of rows of 64 floats: 8 lanes for each, two vectors of 16 bytes a lane, four rows a warp.
#include "rows.cuh"

extern "C" __global__ void norm_heads(const float* x, const float* weight, float* out, int rows, float eps) {
    wait_for_previous();
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / 8, column = threadIdx.x % 8 * 8;
    bool there = row < rows;
    float value[8] = {}, w[8], squares = 0.f;
    load(weight + column, w);
    if (there) load(x + row * 64 + column, value);
    for (int i = 0; i < 8; i++) squares += value[i] * value[i];
    squares = warp_reduce<8>(squares, Sum());  // all 32 lanes take part
    float scale = rsqrtf(squares / 64 + eps);
    for (int i = 0; i < 8; i++) value[i] *= scale * w[i];
    if (there) store(out + row * 64 + column, value);
}
