// Root mean square norm of rows, by itself and after an addition.
//
// A row is read once and stays in registers: it belongs to WARPS warps, and each of their threads holds ITEMS pieces
// of WIDTH neighbours, 32 * WARPS * ITEMS * WIDTH >= width in all. Of wide rows there is one to a block. Narrow ones,
// such as the heads of queries and keys, take a warp each (WARPS = 1) and ROWS of them share a block.
//
// T: type of the activations; WIDTH: a vector of 16 bytes of them, or one where rows are not made of such.
#include "rows.cuh"

constexpr int THREADS = 32 * WARPS;  // of a row

// The columns of a piece: neighbouring threads hold neighbouring pieces, so that a warp reads one stretch of memory.
DEVICE int column_of(int item) { return (item * THREADS + threadIdx.x % THREADS) * WIDTH; }

// This thread's pieces of a row; zeros behind its end, which add nothing to the sum of squares.
template <typename V> DEVICE void load_pieces(const V* row, int width, float (&x)[ITEMS][WIDTH]) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (column_of(i) < width) {
            load(row + column_of(i), x[i]);
        } else {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) x[i][j] = 0.f;
        }
    }
}

DEVICE void store_pieces(T* row, int width, const float (&x)[ITEMS][WIDTH]) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (column_of(i) < width) store(row + column_of(i), x[i]);
}

// x / sqrt(mean(x²) + eps) * weight. Every thread of the row must take part.
DEVICE void normalize(float (&x)[ITEMS][WIDTH], const float (&weight)[ITEMS][WIDTH], int width, float eps) {
    __shared__ float scratch[WARPS];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
#pragma unroll
        for (int j = 0; j < WIDTH; j++) squares += x[i][j] * x[i][j];
    squares = block_reduce<WARPS>(squares, 0.f, scratch, Sum());
    float scale = rsqrtf(squares / width + eps);
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
#pragma unroll
        for (int j = 0; j < WIDTH; j++) x[i][j] = x[i][j] * scale * weight[i][j];
}

// Row r of x and of out begins at element (r / inner) * outer stride + (r % inner) * inner stride.
extern "C" __global__ void __launch_bounds__(32 * WARPS * ROWS)
rms_norm(const T* x, const float* weight, T* out, int rows, int width, float eps, int inner, long long x_outer,
         long long x_inner, long long out_outer, long long out_inner) {
    launch_next();
    // Weights are constants: they are fetched while the kernel in front still computes x.
    float w[ITEMS][WIDTH], value[ITEMS][WIDTH];
    load_pieces(weight, width, w);
    int row = blockIdx.x * ROWS + threadIdx.x / THREADS, outer = row / inner, within = row % inner;
    wait_for_previous();
    if (row >= rows) return;  // a whole warp of several rows' block, never a part of a row
    load_pieces(x + outer * x_outer + within * x_inner, width, value);
    normalize(value, w, width, eps);
    store_pieces(out + outer * out_outer + within * out_inner, width, value);
}

// residual += x; out = rms_norm(residual). The sum is rounded to T first: fused or not, the result is the same.
extern "C" __global__ void __launch_bounds__(32 * WARPS * ROWS)
add_rms_norm(T* residual, const T* x, const float* weight, T* out, int rows, int width, float eps,
             long long residual_stride, long long x_stride, long long out_stride) {
    launch_next();
    float w[ITEMS][WIDTH], value[ITEMS][WIDTH], added[ITEMS][WIDTH];
    load_pieces(weight, width, w);
    int row = blockIdx.x * ROWS + threadIdx.x / THREADS;
    wait_for_previous();
    if (row >= rows) return;
    load_pieces(residual + row * residual_stride, width, value);
    load_pieces(x + row * x_stride, width, added);
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
#pragma unroll
        for (int j = 0; j < WIDTH; j++) value[i][j] = to_float(from_float<T>(value[i][j] + added[i][j]));
    store_pieces(residual + row * residual_stride, width, value);
    normalize(value, w, width, eps);
    store_pieces(out + row * out_stride, width, value);
}
