// Softmax of long rows. Even one row of a vocabulary would keep a single multiprocessor busy for 20 us, so each block
// takes a chunk: `softmax_parts` finds its maximum and its sum, `softmax` merges those of the row and writes.
//
// A chunk is 256 threads times ELEMENTS elements, WIDTH neighbours at a time (a vector of 16 bytes, or one).
#include "rows.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, ELEMENTS = 16, ITEMS = ELEMENTS / WIDTH;

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }
DEVICE int column_of(int item) { return ((blockIdx.x * ITEMS + item) * THREADS + threadIdx.x) * WIDTH; }

// This thread's part of the chunk; behind the end of the row, what adds nothing to maximum and sum.
DEVICE void load_chunk(const float* row, int width, float (&x)[ITEMS][WIDTH]) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (column_of(i) < width) {
            load(row + column_of(i), x[i]);
        } else {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) x[i][j] = minus_infinity();
        }
    }
}

// For each row the maximum m of each chunk, and its sum of e**(x - m). fmaxf passes over NaN, but the sum does not.
extern "C" __global__ void __launch_bounds__(256)
softmax_parts(const float* x, float2* parts, int rows, int width, long long stride) {
    __shared__ float scratch[2][WARPS];
    launch_next();
    wait_for_previous();
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        float value[ITEMS][WIDTH], best = minus_infinity(), total = 0.f;
        load_chunk(x + row * stride, width, value);
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++) best = fmaxf(best, value[i][j]);
        best = block_reduce<WARPS>(best, minus_infinity(), scratch[0], Max());
        // A chunk of nothing but minus infinity sums to 0, unless the whole row is like that: then `softmax` makes NaN.
        float base = best == minus_infinity() ? 0.f : best;
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++) total += expf(value[i][j] - base);
        total = block_reduce<WARPS>(total, 0.f, scratch[1], Sum());
        if (threadIdx.x == 0) parts[(long long)row * gridDim.x + blockIdx.x] = make_float2(best, total);
    }
}

extern "C" __global__ void __launch_bounds__(256)
softmax(const float* x, const float2* parts, float* out, int rows, int width, long long x_stride, long long out_stride) {
    launch_next();
    wait_for_previous();
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        float value[ITEMS][WIDTH], best = minus_infinity(), total = 0.f;
        load_chunk(x + row * x_stride, width, value);
        // Every warp merges for itself: the parts of a row are few, and no warp has to wait for another.
        const float2* of_row = parts + (long long)row * gridDim.x;
        int lane = threadIdx.x & 31, count = gridDim.x;
        for (int i = lane; i < count; i += 32) best = fmaxf(best, of_row[i].x);
        best = warp_max(best);
        for (int i = lane; i < count; i += 32) total += of_row[i].y * expf(of_row[i].x - best);
        float scale = 1.f / warp_sum(total);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) value[i][j] = expf(value[i][j] - best) * scale;
            if (column_of(i) < width) store(out + row * out_stride + column_of(i), value[i]);
        }
    }
}
