// Matrix product for every chip with tensor cores: Y[M, N] = X[M, K] W[N, K]^T (+ bias), float32 sums. A block brings
// pieces of 64 columns of K to shared memory, STAGES at a time, and its warps multiply 16x8x16 blocks of them.
//
//   T                  bf16 or f16: elements of X, and of W unless that is quantized. K is a multiple of 8
//   TILE_M, TILE_N     the tile of Y that a block makes (with EPILOGUE 2: TILE_N / 2 columns of it)
//   WARPS_M, WARPS_N   warps that share the tile; WARPS_K: ... and that share the columns of a piece, if M is small
//   BITS               0, or those of a code of W (CODING, SCALE: see fragments.cuh); K is a multiple of 16, of 32 if BITS < 8
//   GROUP              columns that share a scale: 16, 32, or a multiple of 64
//   EARLY              1: W is constant. 0: the kernel in front may write it
#include "fragments.cuh"
#include "gemm.cuh"
#include "mma.cuh"

constexpr int STEP = 64;  // columns of K in a stage
constexpr int THREADS = 32 * WARPS_M * WARPS_N * WARPS_K;
constexpr int BLOCKS_M = TILE_M / WARPS_M / 16, BLOCKS_N = TILE_N / WARPS_N / 8;  // of a warp
constexpr bool QUANTIZED = BITS > 0, HAS_SUPER_BLOCKS = sizeof(SCALE) == 1;
constexpr int GROUP_COLUMNS = QUANTIZED ? GROUP : STEP, STEP_GROUPS = GROUP_COLUMNS < STEP ? STEP / GROUP_COLUMNS : 1;
constexpr int FIRST_BITS = QUANTIZED ? LOW_BITS : 16;  // of elements of W, or of the first of two planes of it
constexpr int FIRST_AT = TILE_M * 128, HIGH_AT = FIRST_AT + TILE_N * FIRST_BITS * 8, GROUPS_AT = HIGH_AT + TILE_N * HIGH_BITS * 8;
constexpr int STAGE_BYTES = GROUPS_AT + (QUANTIZED ? TILE_N * STEP_GROUPS * (HAS_ZEROS ? 8 : 4) : 0);
static_assert(BLOCKS_M > 0 && BLOCKS_N % (QUANTIZED ? 1 : 2) == 0 && 4 % WARPS_K == 0, "tile");
static_assert(STEP % GROUP_COLUMNS == 0 || GROUP_COLUMNS % STEP == 0, "groups");

// Rows of a stage are 8 bytes for each bit of an element. Which 16 bytes of them lie where depends on the row, so that rows that
// are read together lie in different banks.
template <int ELEMENT_BITS> DEVICE int chunk_at(int row, int chunk) {
    constexpr int BYTES = ELEMENT_BITS * 8;
    return row * BYTES + ((chunk ^ (BYTES == 128 ? row & 7 : BYTES == 64 ? (row >> 1) & 3 : BYTES == 32 ? (row >> 2) & 1 : 0)) << 4);
}

// The operands, and how they come to shared memory.
struct Operands {
    const char *x, *w, *high;
    const SCALE* scales;
    const f16* super_scales;
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
            copy_async_or_zero(stage + chunk_at<16>(r, chunk), there ? x + m * x_stride + k * 2 : x, there);
        }
    }
    // Elements of 16, 8 or 4 bits.
    template <int ELEMENT_BITS> DEVICE void fetch_rows(char* to, const char* from, long long stride, int step) const {
        constexpr int CHUNKS = ELEMENT_BITS / 2, WIDE = 128 / ELEMENT_BITS;
#pragma unroll
        for (int i = threadIdx.x; i < TILE_N * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, chunk = i % CHUNKS, n = weight_row(r), k = step * STEP + chunk * WIDE;
            const bool there = n >= 0 && k < columns;
            copy_async_or_zero(to + chunk_at<ELEMENT_BITS>(r, chunk), there ? from + n * stride + k * ELEMENT_BITS / 8 : from, there);
        }
    }
    // Elements of 2 bits or 1, a word at a time: rows need not be aligned for more.
    template <int ELEMENT_BITS> DEVICE void fetch_words(char* to, const char* from, int step) const {
        constexpr int WORDS = ELEMENT_BITS * 2, WIDE = 32 / ELEMENT_BITS;
#pragma unroll
        for (int i = threadIdx.x; i < TILE_N * WORDS; i += THREADS) {
            const int n = weight_row(i / WORDS), k = step * STEP + i % WORDS * WIDE;
            const bool there = n >= 0 && k < columns;
            copy_async_word(to + i * 4, there ? from + ((long long)n * columns + k) * ELEMENT_BITS / 8 : from, there ? 4 : 0);
        }
    }
    DEVICE void fetch_w(char* stage, int step) const {
        if (FIRST_BITS == 2) fetch_words<FIRST_BITS>(stage + FIRST_AT, w, step);
        else fetch_rows<FIRST_BITS>(stage + FIRST_AT, w, QUANTIZED ? (long long)columns * FIRST_BITS / 8 : w_stride, step);
        if (HIGH_BITS) fetch_words<HIGH_BITS ? HIGH_BITS : 1>(stage + HIGH_AT, high, step);
    }
};

// A thread's share of the scales of a stage, on their way through registers.
struct Scales {
    static constexpr int COUNT = (TILE_N * STEP_GROUPS + THREADS - 1) / THREADS;
    static constexpr int PARTS = HAS_ZEROS ? 2 : 1;
    Pack<SCALE, PARTS> stored[COUNT];
    Pack<f16, PARTS> of_super_block[COUNT];
    bool there[COUNT];

    DEVICE void fetch(const Operands& operands, int step) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int index = i * THREADS + threadIdx.x, n = index < TILE_N * STEP_GROUPS ? operands.weight_row(index % TILE_N) : -1;
            const int k = step * STEP + index / TILE_N * GROUP_COLUMNS;
            there[i] = n >= 0 && k < operands.columns;
            if (!there[i]) continue;
            const long long in_row = operands.columns / GROUP_COLUMNS;
            stored[i] = ((const Pack<SCALE, PARTS>*)operands.scales)[n * in_row + k / GROUP_COLUMNS];
            if (HAS_SUPER_BLOCKS) of_super_block[i] = ((const Pack<f16, PARTS>*)operands.super_scales)[n * (operands.columns / 256ll) + k / 256];
        }
    }
    DEVICE float number(int i, int part) const {
        return to_float(stored[i].item[part]) * (HAS_SUPER_BLOCKS ? to_float(of_super_block[i].item[part]) : 1.f);
    }
    DEVICE void store(char* stage) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int index = i * THREADS + threadIdx.x;
            float s = 0.f, z = 0.f;
            if (there[i]) {
                s = number(i, 0);
                if (HAS_ZEROS) z = number(i, PARTS - 1);
            }
            const PairGroup group = pair_group<T>(s, z);
            if (index >= TILE_N * STEP_GROUPS) continue;
            if (HAS_ZEROS) ((PairGroup*)(stage + GROUPS_AT))[index] = group;
            else ((unsigned*)(stage + GROUPS_AT))[index] = group.factor;
        }
    }
};

// A warp's part of the products of one stage. Lane l of the warp, with g = l / 4 and t = l % 4, holds what mma_16x8x16 says.
struct Products {
    float acc[BLOCKS_M][BLOCKS_N][4] = {};
    int row, column, lane;  // where the warp's part of the tile begins

    DEVICE void multiply(const char* stage, int k) {  // 16 columns of K
        unsigned a[BLOCKS_M][4], b[BLOCKS_N][2];
#pragma unroll
        for (int i = 0; i < BLOCKS_M; i++) load_matrices(a[i], stage + chunk_at<16>(row + 16 * i + lane % 16, 2 * k + lane / 16));
        if (QUANTIZED) load_codes(b, stage, k);
        else load(b, stage, k);
#pragma unroll
        for (int i = 0; i < BLOCKS_M; i++)
#pragma unroll
            for (int j = 0; j < BLOCKS_N; j++) mma_16x8x16<T>(acc[i][j], a[i], b[j][0], b[j][1]);
    }

    DEVICE void load(unsigned (&b)[BLOCKS_N][2], const char* stage, int k) const {
#pragma unroll
        for (int j = 0; j < BLOCKS_N; j += 2) {
            unsigned r[4];
            load_matrices(r, stage + FIRST_AT + chunk_at<16>(column + 8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
        }
    }

    DEVICE void load_codes(unsigned (&b)[BLOCKS_N][2], const char* stage, int k) const {
        const Place place(lane % 4);
#pragma unroll
        for (int j = 0; j < BLOCKS_N; j++) {
            const int r = column + 8 * j + lane / 4, index = k * 16 / GROUP_COLUMNS * TILE_N + r;
            const char* low = stage + FIRST_AT + chunk_at<FIRST_BITS>(r, k * LOW_BITS / 8) + k * LOW_BITS * 2 % 16;
            Codes<16> codes;
            codes.load(low, stage + HIGH_AT + r * HIGH_BITS * 8 + k * HIGH_BITS / 2 * 4, k * 16);
            PairGroup group = {};
            if (HAS_ZEROS) group = ((const PairGroup*)(stage + GROUPS_AT))[index];
            else group.factor = ((const unsigned*)(stage + GROUPS_AT))[index];
            b[j][0] = codes.weights<T>(0, place, group), b[j][1] = codes.weights<T>(1, place, group);
        }
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
gemm(const T* x, const void* w, const void* high, const SCALE* scales, const f16* super_scales, const float* bias, OUT* out, int rows,
     int width, int columns, long long x_stride, long long w_stride, long long out_stride, int tiles_m, int tiles_n, int raster) {
    const int warp = threadIdx.x / 32, warp_k = warp / (WARPS_M * WARPS_N), part = warp % (WARPS_M * WARPS_N);
    const Tile tile = tile_at(blockIdx.x, tiles_m, tiles_n, raster);
    const int first_m = tile.p * TILE_M, first_n = tile.q * (GATED ? TILE_N / 2 : TILE_N);
    const Operands operands = {(const char*)x, (const char*)w, (const char*)high, scales, super_scales, x_stride * 2, w_stride * 2,
                               rows, width, columns, first_m, first_n};
    const int steps = ceil_div(columns, STEP);
    Scales ahead;
    launch_next();
    if (!EARLY) wait_for_previous();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {  // the weights do not depend on the kernel in front
        if (s >= steps) break;
        operands.fetch_w(shared_memory + s * STAGE_BYTES, s);
        if (!QUANTIZED) continue;
        ahead.fetch(operands, s);
        ahead.store(shared_memory + s * STAGE_BYTES);
    }
    if (EARLY) wait_for_previous();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) operands.fetch_x(shared_memory + s * STAGE_BYTES, s);
        commit_copies();
    }

    Products products;
    products.lane = threadIdx.x % 32;
    products.row = part % WARPS_M * (TILE_M / WARPS_M);
    products.column = part / WARPS_M * (TILE_N / WARPS_N);
    int slot = 0, next = STAGES - 1, before = 0;  // where this step lies, the next one that is fetched, and that in front of it
    for (int step = 0; step < steps; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (QUANTIZED && step > 0 && step + STAGES - 2 < steps) ahead.store(shared_memory + before * STAGE_BYTES);
        if (step + STAGES - 1 < steps) {
            operands.fetch_w(shared_memory + next * STAGE_BYTES, step + STAGES - 1);
            operands.fetch_x(shared_memory + next * STAGE_BYTES, step + STAGES - 1);
            if (QUANTIZED) ahead.fetch(operands, step + STAGES - 1);
        }
        commit_copies();
#pragma unroll
        for (int k = 0; k < 4 / WARPS_K; k++) products.multiply(shared_memory + slot * STAGE_BYTES, warp_k * (4 / WARPS_K) + k);
        before = next;
        if (++slot == STAGES) slot = 0;
        if (++next == STAGES) next = 0;
    }
    wait_for_copies<0>();
    if (products.merge(part, warp_k)) products.write(Result(out, out_stride, rows, width), bias, first_m, first_n);
}
