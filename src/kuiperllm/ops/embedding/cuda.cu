// Rows of a table by token id; zeros for an id outside it. A thread writes WIDTH neighbours of a row: 8, or 1 where
// rows are not made of aligned eights.
//
// T: type of the result; S: of the table.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(128)
embedding_float(const int* ids, const S* table, T* out, int tokens, int vocabulary, int width, long long table_stride,
                long long out_stride) {
    launch_next();
    wait_for_previous();
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= width) return;
    for (int token = blockIdx.y; token < tokens; token += gridDim.y) {
        int id = ids[token];
        float value[WIDTH] = {};
        if (id >= 0 && id < vocabulary) load(table + id * table_stride + column, value);
        store(out + token * out_stride + column, value);
    }
}
