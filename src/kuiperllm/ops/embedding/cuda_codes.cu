// Rows of a quantized table by token id, as cuda.cu looks up others. A thread writes WIDTH neighbours of a row: 8, or 1 where
// the columns are stored in another order.
//
// T: type of the result; BITS, CODING, SCALE, GROUP: of the scheme.
#include "rows.cuh"
#include "ops/linear/codes.cuh"

// columns: where a stored column belongs, or null: where it is.
extern "C" __global__ void __launch_bounds__(128)
embedding_codes(const int* ids, const unsigned char* table, const SCALE* scales, const f16* super_scales, const int* columns, T* out,
                int tokens, int vocabulary, int width, long long out_stride) {
    launch_next();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= width) return;
    for (int token = blockIdx.y; token < tokens; token += gridDim.y) {
        const long long id = ids[token];
        float value[WIDTH] = {};
        if (id >= 0 && id < vocabulary) {
            const long long group_index = id * (width / GROUP) + column / GROUP, block = id * (width / 256) + column / 256;
            const Group group = load_group<BITS, CODING>(scales, group_index, super_scales, block);
#pragma unroll
            for (int i = 0; i < WIDTH; i++)
                value[i] = fmaf(group.factor, centred_code<BITS, CODING>(table, vocabulary, width, id, column + i), group.offset);
        }
        T* row = out + token * out_stride;
        if (WIDTH == 1) row[columns ? columns[column] : column] = from_float<T>(value[0]);
        else store(row + column, value);
    }
}
