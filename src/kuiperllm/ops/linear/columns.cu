// The columns of a matrix in another order.
#include "common.cuh"

// out[i][j] = x[i][order[j]]; rows of x are `stride` elements apart.
extern "C" __global__ void __launch_bounds__(256)
gather_columns(const T* x, const int* order, T* out, int rows, int columns, long long stride) {
    const int j = blockIdx.x * 256 + threadIdx.x, from = j < columns ? order[j] : 0;
    launch_next();
    wait_for_previous();
    if (j >= columns) return;
    for (long long i = blockIdx.y; i < rows; i += gridDim.y) out[i * columns + j] = x[i * stride + from];
}
