// Some rows of a matrix; zeros for a row that it does not have. A thread copies WIDTH neighbours: a vector of 16
// bytes, or one element where rows are not made of vectors.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
take_rows(const T* x, const int* rows, T* out, int tokens, int count, int width, long long x_stride, long long out_stride) {
    launch_next();
    wait_for_previous();
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= width) return;
    for (int s = blockIdx.y; s < count; s += gridDim.y) {
        int row = rows[s];
        Pack<T, WIDTH> value = {};
        if (row >= 0 && row < tokens) value = *(const Pack<T, WIDTH>*)(x + row * x_stride + column);
        *(Pack<T, WIDTH>*)(out + s * out_stride + column) = value;
    }
}
