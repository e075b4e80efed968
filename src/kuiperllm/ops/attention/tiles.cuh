// Tiles of 16-bit keys and values in shared memory, and their products with the tensor cores of a warp.
//
// A row is padded to COLUMNS elements, a multiple of 16, of which those past D are zeros, and 16 bytes more, so that the
// eight rows of a matrix lie in different banks.
//
// T: bf16 or f16; D: elements of a head, a multiple of 8; BLOCK: tokens in a block of the cache.
#pragma once
#include "mma.cuh"
#include "softmax.cuh"

constexpr int COLUMNS = (D + 15) / 16 * 16;
constexpr int ROW = COLUMNS + 8;         // elements from one row to the next
constexpr int UNITS = COLUMNS / 8;       // pieces of 16 bytes in a row
constexpr int STEPS_D = COLUMNS / 16;    // products along a row

// Queue the copy of unit `unit` of a tile. `row` is that row in global memory, or `valid` is false: then zeros.
DEVICE void copy_unit(T* tile, int row_of_tile, int unit, const T* row, bool valid) {
    bool inside = valid && (D % 16 == 0 || unit * 8 < D);
    copy_async_or_zero(tile + row_of_tile * ROW + unit * 8, inside ? row + unit * 8 : row, inside);
}

// scores[i] += queries * keys: 16 rows of queries; 8 keys for each i, the rows of `keys`.
template <int COUNT> DEVICE void multiply_keys(float (&scores)[COUNT / 8][4], const unsigned (&queries)[STEPS_D][4], const T* keys) {
    int lane = threadIdx.x & 31;
    const T* matrix = keys + ((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int step = 0; step < STEPS_D; step++) {
#pragma unroll
        for (int key = 0; key < COUNT; key += 16) {
            unsigned b[4];
            load_matrices(b, matrix + key * ROW + step * 16);
            mma_16x8x16<T>(scores[key / 8], queries[step], b[0], b[1]);
            mma_16x8x16<T>(scores[key / 8 + 1], queries[step], b[2], b[3]);
        }
    }
}

// mixed[i] += weights * values: 16 rows of weights, COUNT of each; 8 columns of the values for each i. The weights are the
// accumulators that `multiply_keys` left, turned into weights: rounded, they are operands as they lie.
template <int COUNT> DEVICE void multiply_values(float (&mixed)[COLUMNS / 8][4], const float (&weights)[COUNT / 8][4], const T* values) {
    int lane = threadIdx.x & 31;
    const T* matrix = values + ((lane & 7) + (lane >> 3 & 1) * 8) * ROW + (lane >> 4) * 8;
#pragma unroll
    for (int key = 0; key < COUNT; key += 16) {
        const float(&low)[4] = weights[key / 8], (&high)[4] = weights[key / 8 + 1];
        unsigned a[4] = {pack2<T>(low[0], low[1]), pack2<T>(low[2], low[3]), pack2<T>(high[0], high[1]), pack2<T>(high[2], high[3])};
#pragma unroll
        for (int column = 0; column < COLUMNS; column += 16) {
            unsigned b[4];
            load_matrices_transposed(b, matrix + key * ROW + column);
            mma_16x8x16<T>(mixed[column / 8], a, b[0], b[1]);
            mma_16x8x16<T>(mixed[column / 8 + 1], a, b[2], b[3]);
        }
    }
}

// The running softmax of rows r = lane / 4 and r + 8 of a warp's 16. `sum` is that of this lane's columns alone.
struct Softmax {
    float top[2], sum[2];

    DEVICE Softmax() : top{LOWEST, LOWEST}, sum{0.f, 0.f} {}

    // Turn scores (times `scale`, which includes log2 e) into weights, and scale what has been mixed so far.
    // ROWS 1: rows r + 8 are not wanted.
    template <int COUNT, int ROWS = 2> DEVICE void weigh(float (&scores)[COUNT / 8][4], float (&mixed)[COLUMNS / 8][4], float scale) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float highest = scores[0][2 * r];
#pragma unroll
            for (int i = 0; i < COUNT / 8; i++) highest = fmaxf(highest, fmaxf(scores[i][2 * r], scores[i][2 * r + 1]));
            highest = fmaxf(top[r], warp_reduce<4>(highest, Max()) * scale);
            float shrink = exp2_approx(top[r] - highest);
            top[r] = highest;
            sum[r] *= shrink;
#pragma unroll
            for (int i = 0; i < COUNT / 8; i++) {
#pragma unroll
                for (int j = 2 * r; j < 2 * r + 2; j++) {
                    scores[i][j] = exp2_approx(scores[i][j] * scale - highest);
                    sum[r] += scores[i][j];
                }
            }
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; i++) mixed[i][2 * r] *= shrink, mixed[i][2 * r + 1] *= shrink;
        }
    }
    // The sums over all columns, the same in the four lanes of a row.
    DEVICE void finish() { sum[0] = warp_reduce<4>(sum[0], Sum()), sum[1] = warp_reduce<4>(sum[1], Sum()); }
};

template <int N> DEVICE void clear(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0.f;
}
