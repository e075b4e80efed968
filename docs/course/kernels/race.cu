// A sum over a block that is WRONG: nothing makes a warp wait until the others have written.
#include "common.cuh"

extern "C" __global__ void race(const float* x, float* out) {
    __shared__ float scratch[WARPS];
    wait_for_previous();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float value = warp_sum(x[threadIdx.x]);
    if (lane == 0) scratch[warp] = value;
    // __syncthreads() belongs here
    value = warp_sum(lane < WARPS ? scratch[lane] : 0.f);
    out[threadIdx.x] = value;
}
