// CUDA kernel of `argmax`.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
argmax(const float* logits, u64* winners, int* out, int rows, int width, long long stride, int blocks) {
    launch_next();
    wait_for_previous();
    argmax_of_rows(logits, winners, rows, width, stride, blocks, [&](int row, int token) { out[row] = token; });
}
