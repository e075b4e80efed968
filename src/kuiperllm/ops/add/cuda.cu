// Elementwise sum. T: type of the elements; WIDTH: neighbours that a thread adds, a vector of 16 bytes or one.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(256)
add(const T* x, const T* y, T* out, int rows, int width, long long x_stride, long long y_stride, long long out_stride) {
    launch_next();
    wait_for_previous();
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= width) return;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        float a[WIDTH], b[WIDTH];
        load(x + row * x_stride + column, a);
        load(y + row * y_stride + column, b);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) a[i] += b[i];
        store(out + row * out_stride + column, a);
    }
}
