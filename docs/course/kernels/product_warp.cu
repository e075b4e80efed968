// Y[M, N] = X[M, K] W[N, K]^T: a warp for each 16 x 8 of Y. M, N and K are multiples of 16, 8 and 16.
#include "mma.cuh"

DEVICE unsigned pair_at(const bf16* p) { return *(const unsigned*)p; }

extern "C" __global__ void product_warp(const bf16* x, const bf16* w, float* y, int n, int k) {
    wait_for_previous();
    int g = threadIdx.x / 4, t = threadIdx.x % 4, row = blockIdx.y * 16 + g, first = blockIdx.x * 8;
    float sum[4] = {};
    for (int i = 2 * t; i < k; i += 16) {
        const bf16 *upper = x + row * k + i, *lower = upper + 8 * k, *column = w + (first + g) * k + i;
        unsigned a[4] = {pair_at(upper), pair_at(lower), pair_at(upper + 8), pair_at(lower + 8)};
        mma_16x8x16<bf16>(sum, a, pair_at(column), pair_at(column + 8));
    }
    float* to = y + row * n + first + 2 * t;
    to[0] = sum[0], to[1] = sum[1], to[8 * n] = sum[2], to[8 * n + 1] = sum[3];
}
