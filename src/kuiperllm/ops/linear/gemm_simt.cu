// Matrix product with exact float32 products, for operands of any type and alignment: Y[M, N] = X[M, K] W[N, K]^T (+ bias).
// 256 threads; each makes ROWS x COLUMNS elements of a tile from registers.
//
//   T, W      elements of X and of W; no matter which if that is quantized
//   BITS      0, or those of a code of W; CODING: see codes.cuh; SCALE: type of scales
//   LOAD      elements that are read at a time: 4, where rows are aligned for that, or 1
#include "codes.cuh"
#include "gemm.cuh"

constexpr int STEP = 16;  // columns of K in shared memory at a time
constexpr int ROWS = TILE_M / 16, COLUMNS = TILE_N / 16;
// A thread's rows lie in runs of RUN_M, one run for each 16 RUN_M rows of the tile; its columns in two runs, the gate's and up's.
constexpr int RUN_M = ROWS < 4 ? ROWS : 4, RUN_N = COLUMNS / 2;
constexpr int X_PIECES = TILE_M * STEP / LOAD / 256, W_PIECES = TILE_N * STEP / LOAD / 256;
static_assert(X_PIECES > 0 && W_PIECES > 0 && ROWS % RUN_M == 0 && COLUMNS % 2 == 0, "tile");

template <typename Element> DEVICE void read(const Element* p, float (&values)[LOAD]) {
    const Pack<Element, LOAD> pack = *(const Pack<Element, LOAD>*)p;
#pragma unroll
    for (int i = 0; i < LOAD; i++) values[i] = to_float(pack.item[i]);
}

// Args: as those of gemm_mma.cu; group: columns that share a scale.
extern "C" __global__ void __launch_bounds__(256)
gemm(const T* x, const W* w, const SCALE* scales, const f16* super_scales, const float* bias, OUT* out, int rows,
     int width, int columns, long long x_stride, long long w_stride, long long out_stride, int group, int tiles_m, int tiles_n,
     int raster) {
    __shared__ __align__(16) float x_tile[2][STEP][TILE_M + 4], w_tile[2][STEP][TILE_N + 4];
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Tile tile = tile_at(blockIdx.x, tiles_m, tiles_n, raster);
    const int first_m = tile.p * TILE_M, first_n = tile.q * (GATED ? TILE_N / 2 : TILE_N);
    launch_next();
    wait_for_previous();

    auto read_codes = [&](long long n, int k, float (&values)[LOAD]) {
        constexpr int bits = BITS ? BITS : 8;
        const Group with = load_group<bits, CODING>(scales, n * (columns / group) + k / group, super_scales, n * (columns / 256) + k / 256);
#pragma unroll
        for (int i = 0; i < LOAD; i++) {
            const float number = centred_code<bits, CODING>((const unsigned char*)w, (GATED ? 2ll : 1ll) * width, columns, n, k + i);
            values[i] = fmaf(number, with.factor, with.offset);
        }
    };
    float x_ahead[X_PIECES][LOAD], w_ahead[W_PIECES][LOAD];
    auto fetch = [&](int k) {  // columns k ... k + STEP to registers
#pragma unroll
        for (int i = 0; i < X_PIECES; i++) {
            const int piece = i * 256 + threadIdx.x, m = first_m + piece / (STEP / LOAD), at = k + piece % (STEP / LOAD) * LOAD;
            if (m < rows && at < columns) read(x + m * x_stride + at, x_ahead[i]);
            else for (float& value : x_ahead[i]) value = 0.f;
        }
#pragma unroll
        for (int i = 0; i < W_PIECES; i++) {
            const int piece = i * 256 + threadIdx.x, r = piece / (STEP / LOAD), at = k + piece % (STEP / LOAD) * LOAD;
            const bool up = GATED && r >= TILE_N / 2;
            const int column = first_n + (up ? r - TILE_N / 2 : r);
            const long long n = up ? column + width : column;
            if (column < width && at < columns) {
                if (BITS) read_codes(n, at, w_ahead[i]);
                else read(w + n * w_stride + at, w_ahead[i]);
            } else for (float& value : w_ahead[i]) value = 0.f;
        }
    };
    auto stage = [&](int buffer) {  // registers to shared memory, columns of K outermost
#pragma unroll
        for (int i = 0; i < X_PIECES; i++)
#pragma unroll
            for (int j = 0; j < LOAD; j++) {
                const int piece = i * 256 + threadIdx.x;
                x_tile[buffer][piece % (STEP / LOAD) * LOAD + j][piece / (STEP / LOAD)] = x_ahead[i][j];
            }
#pragma unroll
        for (int i = 0; i < W_PIECES; i++)
#pragma unroll
            for (int j = 0; j < LOAD; j++) {
                const int piece = i * 256 + threadIdx.x;
                w_tile[buffer][piece % (STEP / LOAD) * LOAD + j][piece / (STEP / LOAD)] = w_ahead[i][j];
            }
    };

    float acc[ROWS][COLUMNS] = {};
    const int steps = ceil_div(columns, STEP);
    fetch(0);
    for (int step = 0; step < steps; step++) {
        const int buffer = step % 2;  // the other one is still read by slower threads
        stage(buffer);
        __syncthreads();
        if (step + 1 < steps) fetch((step + 1) * STEP);
#pragma unroll
        for (int k = 0; k < STEP; k++) {
            Pack<float, RUN_M> a[ROWS / RUN_M];
            Pack<float, RUN_N> b[2];
#pragma unroll
            for (int i = 0; i < ROWS / RUN_M; i++) a[i] = *(const Pack<float, RUN_M>*)&x_tile[buffer][k][(i * 16 + ty) * RUN_M];
#pragma unroll
            for (int j = 0; j < 2; j++) b[j] = *(const Pack<float, RUN_N>*)&w_tile[buffer][k][(j * 16 + tx) * RUN_N];
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) acc[i][j] += a[i / RUN_M].item[i % RUN_M] * b[j / RUN_N].item[j % RUN_N];
        }
    }

    const Result result(out, out_stride, rows, width);
#pragma unroll
    for (int j = 0; j < (GATED ? RUN_N : COLUMNS); j += 2) {
        const int n = first_n + (j / RUN_N * 16 + tx) * RUN_N + j % RUN_N, next = GATED ? j + RUN_N : j;
        const float low = bias_at(bias, width, n), high = bias_at(bias, width, n + 1);
        const float low_up = GATED ? bias_at(bias, width, n, 1) : 0.f, high_up = GATED ? bias_at(bias, width, n + 1, 1) : 0.f;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int m = first_m + (i / RUN_M * 16 + ty) * RUN_M + i % RUN_M;
            if (GATED) result.put(m, n, gated(acc[i][j] + low, acc[i][next] + low_up), gated(acc[i][j + 1] + high, acc[i][next + 1] + high_up));
            else result.put(m, n, acc[i][j] + low, acc[i][j + 1] + high);
        }
    }
}
