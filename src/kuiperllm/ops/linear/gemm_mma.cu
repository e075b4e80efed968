// Matrix product for every chip with tensor cores: Y[M, N] = X[M, K] W[N, K]^T (+ bias), float32 sums. A block brings
// pieces of 64 columns of K to shared memory, STAGES at a time, and its warps multiply 16x8x16 blocks of them.
//
//   T                  bf16 or f16: elements of X, and of W unless that is quantized. K is a multiple of 8
//   TILE_M, TILE_N     the tile of Y that a block makes (with EPILOGUE 2: TILE_N / 2 columns of it)
//   WARPS_M, WARPS_N   warps that share the tile; WARPS_K: ... and that share the columns of a piece, if M is small
//   GROUP              0, or 32, 64, 128: W is int8 with a scale of type SCALE for so many columns
#include "gemm.cuh"
#include "mma.cuh"

constexpr int STEP = 64;  // columns of K in a stage
constexpr int THREADS = 32 * WARPS_M * WARPS_N * WARPS_K;
constexpr int BLOCKS_M = TILE_M / WARPS_M / 16, BLOCKS_N = TILE_N / WARPS_N / 8;  // of a warp
constexpr bool QUANTIZED = GROUP > 0;
constexpr int X_BYTES = TILE_M * 128, W_ROW_BYTES = QUANTIZED ? 64 : 128, W_BYTES = TILE_N * W_ROW_BYTES;
constexpr int SCALES_BYTES = QUANTIZED ? TILE_N * 8 : 0;  // two words for each row
constexpr int STAGE_BYTES = X_BYTES + W_BYTES + SCALES_BYTES;
static_assert(BLOCKS_M > 0 && BLOCKS_N % (QUANTIZED ? 4 : 2) == 0 && 4 % WARPS_K == 0, "tile");

// Rows of a stage are 128 (int8: 64) bytes; which 16 bytes of them lie where depends on the row, so that the rows that are
// read together lie in different banks.
DEVICE int x_at(int row, int chunk) { return row * 128 + ((chunk ^ (QUANTIZED ? (row & 3) << 1 : row & 7)) << 4); }
DEVICE int w_at(int row, int chunk) { return row * W_ROW_BYTES + ((chunk ^ (QUANTIZED ? (row >> 1) & 3 : row & 7)) << 4); }

// The operands, and how they come to shared memory.
struct Operands {
    const char *x, *w, *scales;
    long long x_stride, w_stride;  // bytes
    int rows, width, columns;      // M; N, or F with EPILOGUE 2; K
    int first_m, first_n;

    // The row of W that row r of the tile is; gate and up rows alternate by eights. -1: there is none.
    DEVICE int weight_row(int r) const {
        const int n = first_n + (GATED ? r / 16 * 8 + r % 8 : r);
        return n >= width ? -1 : GATED && r / 8 % 2 ? n + width : n;
    }
    DEVICE void fetch_x(char* stage, int step) const {
#pragma unroll
        for (int i = threadIdx.x; i < TILE_M * 8; i += THREADS) {
            const int r = i / 8, chunk = i % 8, m = first_m + r, k = step * STEP + chunk * 8;
            const bool there = m < rows && k < columns;
            copy_async_or_zero(stage + x_at(r, chunk), there ? x + m * x_stride + k * 2 : x, there);
        }
    }
    DEVICE void fetch_w(char* stage, int step) const {
        constexpr int CHUNKS = W_ROW_BYTES / 16, WIDE = STEP / CHUNKS;
#pragma unroll
        for (int i = threadIdx.x; i < TILE_N * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, chunk = i % CHUNKS, n = weight_row(r), k = step * STEP + chunk * WIDE;
            const bool there = n >= 0 && k < columns;
            copy_async_or_zero(stage + X_BYTES + w_at(r, chunk), there ? w + n * w_stride + k * (16 / WIDE) : w, there);
        }
        if (QUANTIZED) fetch_scales(stage + X_BYTES + W_BYTES, step);
    }
    // The words that hold the scales of these columns. float16: the first may be the upper half of the first word.
    DEVICE void fetch_scales(char* words, int step) const {
        constexpr int GROUP_COLUMNS = QUANTIZED ? GROUP : 1;
        const long long in_row = columns / GROUP_COLUMNS, all = (GATED ? 2 : 1) * width * in_row * (int)sizeof(SCALE);
#pragma unroll
        for (int i = threadIdx.x; i < TILE_N * 2; i += THREADS) {
            const int n = weight_row(i / 2);
            const long long byte = ((n * in_row + step * STEP / GROUP_COLUMNS) * (int)sizeof(SCALE) & -4) + i % 2 * 4;
            const int there = n < 0 || byte >= all ? 0 : (int)min(4ll, all - byte);
            copy_async_word(words + i * 4, there ? scales + byte : scales, there);
        }
    }
};

// A warp's part of the products of one stage. Lane l of the warp, with g = l / 4 and t = l % 4, holds what mma_16x8x16 says.
struct Products {
    float acc[BLOCKS_M][BLOCKS_N][4] = {};
    int row, column, lane;  // where the warp's part of the tile begins

    DEVICE void multiply(const char* stage, int k, unsigned odd_scales, int step) {  // 16 columns of K
        unsigned a[BLOCKS_M][4], b[BLOCKS_N][2];
        if (QUANTIZED) load_quantized(a, b, stage, k, odd_scales, step);
        else load(a, b, stage, k);
#pragma unroll
        for (int i = 0; i < BLOCKS_M; i++)
#pragma unroll
            for (int j = 0; j < BLOCKS_N; j++) mma_16x8x16<T>(acc[i][j], a[i], b[j][0], b[j][1]);
    }

    DEVICE void load(unsigned (&a)[BLOCKS_M][4], unsigned (&b)[BLOCKS_N][2], const char* stage, int k) const {
#pragma unroll
        for (int i = 0; i < BLOCKS_M; i++) load_matrices(a[i], stage + x_at(row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < BLOCKS_N; j += 2) {
            unsigned r[4];
            load_matrices(r, stage + X_BYTES + w_at(column + 8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
        }
    }

    // Reading 16 int8 as if they were 8 elements gives each lane four neighbours, columns 4t ... 4t + 3, where the product
    // wants 2t, 2t + 1, 2t + 8 and 2t + 9. The order of columns is free as long as both operands have the same, so X is read
    // that way too.
    DEVICE void load_quantized(unsigned (&a)[BLOCKS_M][4], unsigned (&b)[BLOCKS_N][2], const char* stage, int k, unsigned odd_scales, int step) const {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < BLOCKS_M; i++) {
            const int r = row + 16 * i + g, chunk = 2 * k + t / 2, half = t % 2 * 8;
            const uint2 upper = *(const uint2*)(stage + x_at(r, chunk) + half), lower = *(const uint2*)(stage + x_at(r + 8, chunk) + half);
            a[i][0] = upper.x, a[i][1] = lower.x, a[i][2] = upper.y, a[i][3] = lower.y;
        }
        constexpr int GROUP_COLUMNS = QUANTIZED ? GROUP : 1;
        const char* words = stage + X_BYTES + W_BYTES + (column + g) * 8;
        const unsigned odd = sizeof(SCALE) == 2 && (step * STEP / GROUP_COLUMNS) % 2 ? ~odd_scales : odd_scales;
#pragma unroll
        for (int j = 0; j < BLOCKS_N; j += 4) {
            unsigned r[4];
            load_matrices(r, stage + X_BYTES + w_at(column + 8 * j + lane, k));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float scale = to_float(((const SCALE*)(words + (j + i) * 64))[(odd >> (j + i) & 1) + k * 16 / GROUP_COLUMNS]);
                b[j + i][0] = dequantize<0>(r[i], scale), b[j + i][1] = dequantize<2>(r[i], scale);
            }
        }
    }

    // Bytes FIRST and the next of four int8. 2^23 + u, for u in 0 ... 255, is the float with u in its lowest bits.
    template <int FIRST> static DEVICE unsigned dequantize(unsigned four, float scale) {
        const unsigned biased = four ^ 0x80808080u;
        const float low = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7650 + FIRST)) - 8388736.f;
        const float high = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7651 + FIRST)) - 8388736.f;
        return pack2<T>(low * scale, high * scale);
    }

    // The scales of these rows whose index among all scales is odd, a bit for each block of rows.
    DEVICE unsigned odd_scales(const Operands& operands) const {
        unsigned odd = 0;
        if (QUANTIZED && sizeof(SCALE) == 2) {
            const int in_row = operands.columns / (QUANTIZED ? GROUP : 1);
#pragma unroll
            for (int j = 0; j < BLOCKS_N; j++) odd |= (operands.weight_row(column + 8 * j + lane / 4) & in_row & 1) << j;
        }
        return odd;
    }

    // The sums of all warps that share this part of the tile, in the first of them; whether this is that.
    DEVICE bool merge(int part, int warp_k) {
        if (WARPS_K == 1) return true;
        __syncthreads();
        float* sums = (float*)shared_memory + part * (WARPS_K - 1) * BLOCKS_M * BLOCKS_N * 4 * 32 + lane;
#pragma unroll
        for (int w = 1; w < WARPS_K; w++)
            if (w == warp_k) each([&](float& value, int i) { sums[((w - 1) * BLOCKS_M * BLOCKS_N * 4 + i) * 32] = value; });
        __syncthreads();
        if (warp_k > 0) return false;
#pragma unroll
        for (int w = 1; w < WARPS_K; w++)
            each([&](float& value, int i) { value += sums[((w - 1) * BLOCKS_M * BLOCKS_N * 4 + i) * 32]; });
        return true;
    }
    template <typename F> DEVICE void each(F visit) {
#pragma unroll
        for (int i = 0; i < BLOCKS_M * BLOCKS_N * 4; i++) visit(acc[i / (BLOCKS_N * 4)][i / 4 % BLOCKS_N][i % 4], i);
    }

    DEVICE void write(const Result& result, const float* bias, int first_m, int first_n) const {
        const int g = lane / 4, t = lane % 4, width = result.width;
#pragma unroll
        for (int j = 0; j < BLOCKS_N; j += GATED ? 2 : 1) {
            const int n = first_n + (GATED ? column / 2 + 4 * j : column + 8 * j) + 2 * t;
            const float low = bias_at(bias, width, n), high = bias_at(bias, width, n + 1);
            const float low_up = GATED ? bias_at(bias, width, n, 1) : 0.f, high_up = GATED ? bias_at(bias, width, n + 1, 1) : 0.f;
#pragma unroll
            for (int i = 0; i < BLOCKS_M; i++)
#pragma unroll
                for (int h = 0; h < 4; h += 2) {
                    const float *a = acc[i][j] + h, *up = acc[i][GATED ? j + 1 : j] + h;
                    const int m = first_m + row + 16 * i + g + 4 * h;
                    if (GATED) result.put(m, n, gated(a[0] + low, up[0] + low_up), gated(a[1] + high, up[1] + high_up));
                    else result.put(m, n, a[0] + low, a[1] + high);
                }
        }
    }
};

// Args: rows, width: of Y; columns: K; strides in elements of X, W and Y; tiles_m, tiles_n, raster: see tile_at.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm(const T* x, const void* w, const void* scales, const float* bias, OUT* out, int rows, int width, int columns,
     long long x_stride, long long w_stride, long long out_stride, int tiles_m, int tiles_n, int raster) {
    const int warp = threadIdx.x / 32, warp_k = warp / (WARPS_M * WARPS_N), part = warp % (WARPS_M * WARPS_N);
    const Tile tile = tile_at(blockIdx.x, tiles_m, tiles_n, raster);
    const int first_m = tile.p * TILE_M, first_n = tile.q * (GATED ? TILE_N / 2 : TILE_N);
    const Operands operands = {(const char*)x, (const char*)w, (const char*)scales, x_stride * 2, w_stride * (QUANTIZED ? 1 : 2),
                               rows, width, columns, first_m, first_n};
    const int steps = ceil_div(columns, STEP);
    launch_next();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)  // the weights do not depend on the kernel in front
        if (s < steps) operands.fetch_w(shared_memory + s * STAGE_BYTES, s);
    wait_for_previous();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) operands.fetch_x(shared_memory + s * STAGE_BYTES, s);
        commit_copies();
    }

    Products products;
    products.lane = threadIdx.x % 32;
    products.row = part % WARPS_M * (TILE_M / WARPS_M);
    products.column = part / WARPS_M * (TILE_N / WARPS_N);
    const unsigned odd_scales = products.odd_scales(operands);
    int slot = 0, next = STAGES - 1;
    for (int step = 0; step < steps; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) {
            operands.fetch_w(shared_memory + next * STAGE_BYTES, step + STAGES - 1);
            operands.fetch_x(shared_memory + next * STAGE_BYTES, step + STAGES - 1);
        }
        commit_copies();
#pragma unroll
        for (int k = 0; k < 4 / WARPS_K; k++)
            products.multiply(shared_memory + slot * STAGE_BYTES, warp_k * (4 / WARPS_K) + k, odd_scales, step);
        if (++slot == STAGES) slot = 0;
        if (++next == STAGES) next = 0;
    }
    wait_for_copies<0>();
    if (products.merge(part, warp_k)) products.write(Result(out, out_stride, rows, width), bias, first_m, first_n);
}
