// Rows of a quantized matrix as T, each weight rounded once, for a matrix product that takes no codes. A thread makes 8
// neighbouring columns.
//
//   T          bf16 or f16
//   BITS, CODING, SCALE: see fragments.cuh
#include "fragments.cuh"

// Args: low, high, scales, super_scales: of the whole matrix; group: columns that share a scale; columns: K; first, rows:
// which to expand; second: where as many others begin that come behind these, or -1; out: [rows (and as many others), K].
extern "C" __global__ void __launch_bounds__(256)
expand_rows(const char* low, const char* high, const SCALE* scales, const f16* super_scales, int group, int columns, int first,
            int second, int rows, T* out) {
    const int in_row = columns / 8, piece = blockIdx.x * 256 + threadIdx.x, row = piece / in_row, column = piece % in_row * 8;
    launch_next();
    wait_for_previous();
    if (row >= (second < 0 ? rows : 2 * rows)) return;
    const long long n = row < rows ? first + row : second + row - rows, at = n * columns + column;
    Codes<8> codes;
    codes.load(low + at * LOW_BITS / 32 * 4, high + at * HIGH_BITS / 32 * 4, column);

    const Group with = load_group<BITS, CODING>(scales, n * (columns / group) + column / group, super_scales, at / 256);
    unsigned pairs[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
        float2 x = unpack2<T>(codes.numbers<T>(0, Place(t)));
        if (!CENTRED) x.x -= raw_bias<T>(CODING) + MIDDLE_CODE, x.y -= raw_bias<T>(CODING) + MIDDLE_CODE;
        pairs[t] = pack2<T>(fmaf(x.x, with.factor, with.offset), fmaf(x.y, with.factor, with.offset));
    }
    *(uint4*)(out + (long long)row * columns + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
