// silu(gate) * up. T: type of the elements; WIDTH: neighbours that a thread computes, a vector of 16 bytes or one.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(256)
silu_mul(const T* gate_up, T* out, int rows, int width, long long gate_up_stride, long long out_stride) {
    launch_next();
    wait_for_previous();
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= width) return;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        float gate[WIDTH], up[WIDTH];
        const T* from = gate_up + row * gate_up_stride + column;
        load(from, gate);
        load(from + width, up);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) gate[i] = silu(gate[i]) * up[i];
        store(out + row * out_stride + column, gate);
    }
}
