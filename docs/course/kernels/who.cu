// Every thread writes down who it is.
#include "common.cuh"

extern "C" __global__ void who(int* out) {
    wait_for_previous();
    int i = blockIdx.x * blockDim.x + threadIdx.x;  // counts the threads of all blocks
    out[3 * i] = blockIdx.x;
    out[3 * i + 1] = threadIdx.x / 32;  // warp within the block
    out[3 * i + 2] = threadIdx.x % 32;  // lane within the warp
}
