// Reads memory as fast as it can be read.
#include "common.cuh"

// Every thread reads vectors a whole grid apart, eight at a time. `sink` is written only if the data are what they
// cannot be, so that the compiler must not leave the reading out.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* data, long long count, unsigned* sink) {
    launch_next();
    wait_for_previous();
    const long long step = gridDim.x * 512ll;
    unsigned seen = 0;
    long long i = blockIdx.x * 512ll + threadIdx.x;
    for (; i + 7 * step < count; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = data[i + k * step];
#pragma unroll
        for (int k = 0; k < 8; k++) seen |= v[k].x | v[k].y | v[k].z | v[k].w;
    }
    for (; i < count; i += step) seen |= data[i].x;
    if (seen) *sink = seen;  // the data are zeros
}
