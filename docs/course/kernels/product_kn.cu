// c[16, 8] = a[16, 16] w[16, 8]: the second operand lies in memory row by row, as [K, N].
#include "mma.cuh"

extern "C" __global__ void product_kn(const bf16* a, const bf16* w, float* c) {
    wait_for_previous();
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    char *of_a = shared_memory, *of_w = shared_memory + 512;
    ((uint4*)of_a)[lane] = ((const uint4*)a)[lane];
    if (lane < 16) ((uint4*)of_w)[lane] = ((const uint4*)w)[lane];
    __syncwarp();
    unsigned x[4], y[4];
    load_matrices(x, of_a + lane % 16 * 32 + lane / 16 * 16);
    load_matrices_transposed(y, of_w + lane % 16 * 16);  // lanes 16 to 31 ask for the same again
    float sum[4] = {};
    mma_16x8x16<bf16>(sum, x, y[0], y[1]);
    float* to = c + g * 8 + 2 * t;
    to[0] = sum[0], to[1] = sum[1], to[64] = sum[2], to[65] = sum[3];
}
