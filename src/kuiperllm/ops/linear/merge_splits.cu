#include "common.cuh"

// Partial results of attention [S, splits, heads * head_dim] to their mean [S, heads * head_dim]; see gemv.cuh.
extern "C" __global__ void __launch_bounds__(256) merge_splits(
    const T* partial, const float2* stats, T* merged, int splits, int heads, int head_dim) {
    launch_next();
    wait_for_previous();
    const int width = heads * head_dim, k = blockIdx.x * 256 + threadIdx.x;
    if (k >= width) return;
    stats += (long long)blockIdx.y * splits * heads + k / head_dim;
    partial += (long long)blockIdx.y * splits * width + k;
    float largest = -1e30f, total = 0.f, sum = 0.f;
    for (int s = 0; s < splits; s++) largest = fmaxf(largest, stats[s * heads].x);
    for (int s = 0; s < splits; s++) {
        float weight = exp2f(stats[s * heads].x - largest) * stats[s * heads].y;
        if (weight > 0.f) total += weight, sum += weight * to_float(partial[(long long)s * width]);
    }
    merged[(long long)blockIdx.y * width + k] = from_float<T>(total > 0.f ? sum / total : 0.f);
}
