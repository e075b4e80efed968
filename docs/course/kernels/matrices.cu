// The fragment of a 16 x 16 operand, from shared memory by one instruction.
#include "mma.cuh"

extern "C" __global__ void matrices(const bf16* a, unsigned* out) {
    wait_for_previous();
    int lane = threadIdx.x;
    ((uint4*)shared_memory)[lane] = ((const uint4*)a)[lane];  // 16 rows of 32 bytes
    __syncwarp();
    unsigned r[4];
    load_matrices(r, shared_memory + lane % 16 * 32 + lane / 16 * 16);
    for (int i = 0; i < 4; i++) out[4 * lane + i] = r[i];
}
