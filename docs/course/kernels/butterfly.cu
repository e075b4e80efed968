// The sum over a warp, and what each lane holds after each of its five steps.
#include "common.cuh"

extern "C" __global__ void butterfly(float* held) {
    wait_for_previous();
    int lane = threadIdx.x;
    float value = lane;
    for (int step = 0, offset = 16; offset; step++, offset /= 2) {
        value += __shfl_xor_sync(WARP_ALL, value, offset);
        held[step * 32 + lane] = value;
    }
}
