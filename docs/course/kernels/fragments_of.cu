// One product of fragments: registers come from memory as they are and go back as they are.
#include "mma.cuh"

extern "C" __global__ void fragments_of(const unsigned* a, const unsigned* b, float* c) {
    wait_for_previous();
    int lane = threadIdx.x;
    unsigned of_a[4];
    float sum[4] = {};
    for (int i = 0; i < 4; i++) of_a[i] = a[4 * lane + i];
    mma_16x8x16<bf16>(sum, of_a, b[2 * lane], b[2 * lane + 1]);
    for (int i = 0; i < 4; i++) c[4 * lane + i] = sum[i];
}
