// Matrix times 1 to 8 vectors on tensor cores: like gemv.cu, for 16-bit weights, where each number of rows of x costs the
// same.
//
// A product of tensor cores takes 16 rows of W, 8 rows of x and 16 of their columns, in any order of the columns. The
// order here is the one in which a lane brings 16 bytes of a row: with g = lane / 4 and t = lane % 4, a lane brings
// piece t of a unit of 64 bytes of rows g and g + 8 of W (of a gate's row g and the row g that it gates), and needs the
// same columns of row g of x. So every lane reads back from its ring just what it copied, and nothing is rearranged.
//
// x either passes through the ring beside W (PROLOGUE PLAIN) or lies in shared memory as lanes need it.
//
// Parameters beside those of gemv.cuh: STAGES of the ring.
#include "mma.cuh"
#include "gemv.cuh"

constexpr int MAX_ROWS = 8;
constexpr int TILE = GATED ? 8 : 16;                         // outputs of a tile of 16 rows of W
constexpr int UNIT_BYTES = 64, UNITS = 2;                    // of a row of W; of a stage
constexpr int UNIT_K = UNIT_BYTES / (int)sizeof(T);
constexpr int STEP_K = UNITS * UNIT_K, STEPS = (K + STEP_K - 1) / STEP_K;
constexpr long long ROW_BYTES = K * (int)sizeof(T);
constexpr int PIECE = 512;                                   // 16 bytes for each lane
constexpr bool X_STREAMED = PROLOGUE == PLAIN;
constexpr int UNIT_SLOT = (X_STREAMED ? 3 : 2) * PIECE, STAGE_BYTES = UNITS * UNIT_SLOT;
static_assert(sizeof(T) == 2, "tensor cores take 16 bits");

struct Lane {
    int lane, g, t;
    // Whether there are columns for this lane in a unit. There are, but at the end of uneven rows.
    DEVICE bool has(int unit) const { return K % STEP_K == 0 || unit * UNIT_BYTES + t * VECTOR_BYTES < ROW_BYTES; }
};

// Pieces of tiles of the matrix, from memory to a stage of the ring. A warp walks along the columns (its steps [begin,
// end)) of one tile, then of the next of its tiles.
struct Fetcher {
    Lane mine;
    const char* weight;
    int outputs, begin, end;
    Share share;
    int left, tile, step;                // steps to be fetched, and the next
    const char *low, *high;              // where this lane goes on in its two rows of the tile
    bool has_low, has_high;

    DEVICE void start_tile() {
        step = begin;
        const int output = tile * TILE + mine.g, second = GATED ? output : output + 8;
        has_low = output < share.count, has_high = second < share.count;
        const int low_row = share.first + output, high_row = share.first + second + (GATED ? outputs : 0);
        const int column = begin * (UNITS * UNIT_BYTES) + mine.t * VECTOR_BYTES;
        low = weight + low_row * ROW_BYTES + column, high = weight + high_row * ROW_BYTES + column;
    }
    DEVICE void fetch(char* stage) {
        if (left > 0) {
            copy_half(stage, low, has_low);
            copy_half(stage + PIECE, high, has_high);
            low += UNITS * UNIT_BYTES, high += UNITS * UNIT_BYTES;
            left--;
            if (++step == end) tile += GROUPS, start_tile();
        }
    }
    DEVICE void copy_half(char* slot, const char* from, bool is_row) const {
#pragma unroll
        for (int u = 0; u < UNITS; u++)
            copy_async_or_zero(slot + u * UNIT_SLOT + mine.lane * VECTOR_BYTES, from + u * UNIT_BYTES, is_row && mine.has(step * UNITS + u));
    }
};

// Row g of x, step after step, to the ring; `next` is where this lane goes on.
struct XFetcher {
    Lane mine;
    const T* next;
    int begin, end, left, step;

    DEVICE void fetch(char* stage) {
        if (left <= 0) return;
#pragma unroll
        for (int u = 0; u < UNITS; u++)
            copy_async_or_zero(stage + u * UNIT_SLOT + 2 * PIECE + mine.lane * VECTOR_BYTES, next + u * UNIT_K, mine.has(step * UNITS + u));
        next += STEP_K, left--;
        if (++step == end) step = begin, next -= (end - begin) * STEP_K;
    }
};

// Where a vector of a row of x lies in shared memory: those that the lanes need at once are neighbours.
DEVICE int place_of_x(int row, int vector, int rows) {
    return (vector / 4 * rows + row) * 4 + vector % 4;
}

// Rows of x to shared memory, normalized or merged, rounded to T, zeros behind them.
DEVICE void stage_rows(const T* x, int stride, const float2* stats, const NormWeights& norm, float eps, int rows, uint4* xs, float* squares) {
    float square[MAX_ROWS];
#pragma unroll
    for (int r = 0; r < MAX_ROWS; r++) square[r] = 0.f;
#pragma unroll
    for (int pass = 0; pass < X_PASSES; pass++) {
        if (!has_x_vector(pass)) continue;
        const int vector = x_vector(pass);
        uint4 v[MAX_ROWS];
#pragma unroll
        for (int r = 0; r < MAX_ROWS; r++)
            if (r < rows) {
                if constexpr (PROLOGUE == MERGE) {
                    float merged[1][VECTOR<T>];
                    merge_splits(x + (long long)r * stride, stats + r * SPLITS * (K / HEAD_DIM), [&](int) { return vector; }, merged);
                    v[r] = pack(merged[0], T());
                } else {
                    v[r] = load_fresh(x + (long long)r * stride + vector * VECTOR<T>);
                }
            }
#pragma unroll
        for (int r = 0; r < MAX_ROWS; r++)
            if (r < rows) {
                float value[VECTOR<T>];
                unpack(v[r], value, T());
                square[r] += sum_of_squares(value);
                xs[place_of_x(r, vector, rows)] = v[r];
            }
    }
    constexpr int PADDED = STEPS * STEP_K / VECTOR<T>;
    for (int item = X_VECTORS * rows + threadIdx.x; item < PADDED * rows; item += THREADS)
        xs[place_of_x(item % rows, item / rows, rows)] = make_uint4(0, 0, 0, 0);
    if constexpr (PROLOGUE == NORM) {
        float sum = warp_sums(square);
        if (threadIdx.x % 4 == 0) squares[threadIdx.x % 32 / 4 * WARPS + threadIdx.x / 32] = sum;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < MAX_ROWS; r++) {
            if (r >= rows) break;
            float scale = norm_scale(squares + r * WARPS, eps);
#pragma unroll
            for (int pass = 0; pass < X_PASSES; pass++) {
                if (!has_x_vector(pass)) continue;
                uint4* at = xs + place_of_x(r, x_vector(pass), rows);
                float value[VECTOR<T>];
                unpack(*at, value, T());
#pragma unroll
                for (int e = 0; e < VECTOR<T>; e++) value[e] *= scale * norm.value[pass][e];
                *at = pack(value, T());
            }
        }
    }
    __syncthreads();
}

// sum += 16 rows of W times 8 rows of x, over the columns of 8 bytes (16-bit weights) of each lane.
DEVICE void multiply(float (&sum)[4], unsigned low0, unsigned high0, unsigned low1, unsigned high1, unsigned x0, unsigned x1) {
    const unsigned a[4] = {low0, high0, low1, high1};
    mma_16x8x16<T>(sum, a, x0, x1);
}

DEVICE void multiply_unit(float (&sum)[4], uint4 low, uint4 high, uint4 x) {
    multiply(sum, low.x, high.x, low.y, high.y, x.x, x.y);
    multiply(sum, low.z, high.z, low.w, high.w, x.z, x.w);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) gemv_mma(
    const T* x, int x_stride, int rows, const float2* stats, const float* norm_weight, float eps,
    const char* weight, const float* bias,
    OUT* out, int out_stride, int outputs, int share, int extra) {
    __shared__ float squares[MAX_ROWS * WARPS];
    const Share mine = share_of_block(share, extra);
    const int warp = threadIdx.x / 32, group = warp / CHUNKS, chunk = warp % CHUNKS;
    const Lane lane = {(int)(threadIdx.x & 31), (int)(threadIdx.x & 31) / 4, (int)threadIdx.x % 4};
    char* ring = shared_memory + warp * (STAGES * STAGE_BYTES);
    uint4* xs = (uint4*)(shared_memory + WARPS * STAGES * STAGE_BYTES);
    constexpr int XS_VECTORS = X_STREAMED ? 0 : STEPS * STEP_K / VECTOR<T>;
    // The pitch spreads the sums of a tile over all banks.
    const PartialSums sums = {(float*)(xs + XS_VECTORS * rows), (share + 16) / 16 * 16 + 4, MAX_ROWS};

    const int tiles = (mine.count + TILE - 1) / TILE, own_tiles = tiles > group ? (tiles - group + GROUPS - 1) / GROUPS : 0;
    const int begin = STEPS * chunk / CHUNKS, end = STEPS * (chunk + 1) / CHUNKS;
    const int count = own_tiles * (end - begin);
    Fetcher fetcher = {lane, weight, outputs, begin, end, mine, count, group};
    fetcher.start_tile();
#pragma unroll 1
    for (int stage = 0; stage < STAGES; stage++) {
        keep_pace(stage, count);
        fetcher.fetch(ring + stage * STAGE_BYTES);
        commit_copies();
    }
    launch_next();

    Outputs results(out, out_stride, outputs, rows, mine, bias);
    NormWeights norm;
    if constexpr (PROLOGUE == NORM) norm.load(norm_weight);
    wait_for_previous();
    results.load_addend();
    const T* own_x = x + (long long)lane.g * x_stride + begin * STEP_K + lane.t * VECTOR<T>;
    XFetcher x_fetcher = {lane, own_x, begin, end, lane.g < rows ? count : 0, begin};  // sums of rows there are not are not used
    if constexpr (X_STREAMED) {
#pragma unroll 1
        for (int stage = 0; stage < STAGES; stage++) {
            x_fetcher.fetch(ring + stage * STAGE_BYTES);
            commit_copies();
        }
    } else {
        stage_rows(x, x_stride, stats, norm, eps, rows, xs, squares);
    }

    char* stage = ring;
    int tile = group, step = begin;
    const int x_step = UNITS * 4 * rows;
    const uint4* x_first = xs + begin * x_step + min(lane.g, rows - 1) * 4 + lane.t;
    const uint4* x_next = x_first;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < count; i++) {
        wait_for_copies<STAGES - 1>();
        uint4 low[UNITS], high[UNITS], xv[UNITS];
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const char* slot = stage + u * UNIT_SLOT + lane.lane * VECTOR_BYTES;
            low[u] = *(const uint4*)slot, high[u] = *(const uint4*)(slot + PIECE);
            xv[u] = X_STREAMED ? *(const uint4*)(slot + 2 * PIECE) : x_next[u * 4 * rows];
        }
#pragma unroll
        for (int u = 0; u < UNITS; u++) multiply_unit(sum, low[u], high[u], xv[u]);
        fetcher.fetch(stage);
        if constexpr (X_STREAMED) x_fetcher.fetch(stage);
        commit_copies();
        x_next += x_step;
        stage = stage == ring + (STAGES - 1) * STAGE_BYTES ? ring : stage + STAGE_BYTES;
        if (++step == end) {
            int output = tile * TILE + lane.g;
            float* at = sums.at(0, chunk, 2 * lane.t) + output;
            float* at_high = GATED ? sums.at(1, chunk, 2 * lane.t) + output : at + 8;
            at[0] = sum[0], at[sums.pitch] = sum[1], at_high[0] = sum[2], at_high[sums.pitch] = sum[3];
            sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
            step = begin, tile += GROUPS, x_next = x_first;
        }
    }
    __syncthreads();
    results.write(sums, [](int) { return 1.f; });
}
