// What the GEMV kernels share: which outputs a block computes, what happens to x in front of the product, and what
// becomes of the sums behind it.
//
// T is the type of x and of norms' and attention's results, OUT that of the outputs, K the columns of the matrix.
// PROLOGUE  PLAIN: x as it is. NORM: rms_norm(x), by a weight and eps. MERGE: x are SPLITS partial results of attention.
// EPILOGUE  STORE, ADD to what `out` holds, or SWIGLU: silu(row o of the product) * row `outputs` + o.
// CHUNKS    warps that share a row of the matrix; each multiplies a chunk of its columns.
// PACE      stages of the ring that are under way together while it is filled for the first time.
// HAS_BIAS  whether a bias, one for each row of the matrix, is added to the product.
#pragma once
#include "common.cuh"

enum Prologue { PLAIN, NORM, MERGE };
enum Epilogue { STORE, ADD, SWIGLU };

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int GROUPS = WARPS / CHUNKS;  // of warps, each group at rows of its own
constexpr bool GATED = EPILOGUE == SWIGLU;
constexpr int X_VECTORS = K / VECTOR<T>;
constexpr int X_PASSES = (X_VECTORS + THREADS - 1) / THREADS;

// Waits, if need be, before one of `count` stages is fetched for the first time. The kernel in front may still run, and waits
// for a few bytes of its own: if all rings were filled as fast as memory can, these would come behind all of that.
DEVICE void keep_pace(int stage, int count) {
    if (stage >= PACE && stage < count) wait_for_copies<PACE - 1>();
}

// --- what a block computes ----------------------------------------------------------------------------------------

// Consecutive outputs: `share` for each block, and one more for the first `extra` of them.
struct Share { int first, count; };

DEVICE Share share_of_block(int share, int extra) {
    int block = blockIdx.x;
    return {block * share + min(block, extra), share + (block < extra)};
}

// --- x --------------------------------------------------------------------------------------------------------------

// What an earlier kernel wrote, maybe while this one was running already: passes by the first-level cache.
DEVICE uint4 load_fresh(const void* p) { return __ldcg((const uint4*)p); }
DEVICE float load_fresh_element(const float* p) { return __ldcg(p); }
template <typename V> DEVICE float load_fresh_element(const V* p) { return to_float(V{__ldcg((const unsigned short*)p)}); }

// Threads share the vectors of a row of x out between them: the one that a thread has in a pass, and whether it exists.
DEVICE int x_vector(int pass) { return pass * THREADS + threadIdx.x; }
DEVICE bool has_x_vector(int pass) { return (pass + 1) * THREADS <= X_VECTORS || x_vector(pass) < X_VECTORS; }

DEVICE float sum_of_squares(const float (&v)[VECTOR<T>]) {
    float sum = 0.f;
#pragma unroll
    for (int e = 0; e < VECTOR<T>; e++) sum += v[e] * v[e];
    return sum;
}

// The weights of the norm for a thread's vectors of x. Loaded in front of the wait, and not as constants, since compilers
// move loads of those behind it.
struct NormWeights {
    float value[X_PASSES][VECTOR<T>];

    DEVICE void load(const float* weight) {
#pragma unroll
        for (int pass = 0; pass < X_PASSES; pass++) {
            const float* from = weight + min(x_vector(pass), X_VECTORS - 1) * VECTOR<T>;
#pragma unroll
            for (int e = 0; e < VECTOR<T>; e += 4) {
                float4 four = __ldcg((const float4*)(from + e));
                value[pass][e] = four.x, value[pass][e + 1] = four.y, value[pass][e + 2] = four.z, value[pass][e + 3] = four.w;
            }
        }
    }
};

// A vector of one row of attention's result, as the splits of the context have left it. `partial` [SPLITS, K]: each split
// normalized by itself; `stats` [SPLITS, K / HEAD_DIM]: the largest score (in powers of 2) and the sum of the weights relative
// to it.
struct Splits {
    uint4 part[SPLITS];
    float2 stat[SPLITS];

    DEVICE void load(const T* partial, const float2* stats, int vector) {
        constexpr int HEADS = K / HEAD_DIM;
        const int head = vector * VECTOR<T> / HEAD_DIM;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            stat[s] = __ldcg(stats + s * HEADS + head);
            part[s] = load_fresh(partial + s * K + vector * VECTOR<T>);
        }
    }
    DEVICE void merge(float (&merged)[VECTOR<T>]) const {
        float largest = stat[0].x, total = 0.f;
#pragma unroll
        for (int s = 1; s < SPLITS; s++) largest = fmaxf(largest, stat[s].x);
#pragma unroll
        for (int e = 0; e < VECTOR<T>; e++) merged[e] = 0.f;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            float weight = exp2f(stat[s].x - largest) * stat[s].y, value[VECTOR<T>];
            total += weight;
            unpack(weight > 0.f ? part[s] : make_uint4(0, 0, 0, 0), value, T());  // an empty split may hold anything
#pragma unroll
            for (int e = 0; e < VECTOR<T>; e++) merged[e] += weight * value[e];
        }
        float inverse = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
        for (int e = 0; e < VECTOR<T>; e++) merged[e] *= inverse;
    }
};

// COUNT vectors of a row, number `vector_of(i)`: as many as registers have room for are asked for before one is merged.
template <int COUNT, typename Vector> DEVICE void merge_splits(const T* partial, const float2* stats, const Vector& vector_of, float (&merged)[COUNT][VECTOR<T>]) {
    constexpr int MOST = 16 / SPLITS > 1 ? 16 / SPLITS : 1, AT_ONCE = COUNT < MOST ? COUNT : MOST;
    Splits splits[AT_ONCE];
#pragma unroll
    for (int start = 0; start < COUNT; start += AT_ONCE) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (start + i < COUNT) splits[i].load(partial, stats, vector_of(start + i));
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (start + i < COUNT) splits[i].merge(merged[start + i]);
    }
}

// --- sums -----------------------------------------------------------------------------------------------------------

// COUNT values (a power of two), each summed over WIDTH neighbouring lanes: of these, lane l gets sum number
// l / (WIDTH / COUNT).
template <int COUNT, int WIDTH = 32> DEVICE float warp_sums(const float (&value)[COUNT]) {
    if constexpr (COUNT == 1) {
        return warp_reduce<WIDTH>(value[0], Sum());
    } else {
        const bool upper = threadIdx.x & (WIDTH / 2);  // the upper half of the lanes takes the upper half of the values
        float rest[COUNT / 2];
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            float low = value[i], high = value[i + COUNT / 2];
            rest[i] = (upper ? high : low) + __shfl_xor_sync(WARP_ALL, upper ? low : high, WIDTH / 2);
        }
        return warp_sums<COUNT / 2, WIDTH / 2>(rest);
    }
}

// 1 / root mean square of a row of x, whose squares the warps have summed up.
DEVICE float norm_scale(const float* squares, float eps) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += squares[warp];
    return rsqrtf(sum / K + eps);
}

// Where the warps leave the sums of their chunks.
struct PartialSums {
    float* start;
    int pitch, slots;  // at least the outputs of a block; rows of x that there is room for

    // half: 1 is the second of the two rows of the matrix that a gated output needs.
    DEVICE float* at(int half, int chunk, int slot) const { return start + ((half * CHUNKS + chunk) * slots + slot) * pitch; }
    DEVICE float sum(int half, int slot, int output) const {
        float sum = 0.f;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) sum += at(half, chunk, slot)[output];
        return sum;
    }
};

// --- outputs --------------------------------------------------------------------------------------------------------

// The outputs of a block for all rows of x, dealt out to its threads. What the first output of each thread is made of
// besides the product is fetched early; few have a second one.
struct Outputs {
    OUT* out;
    const float* bias;
    int stride, outputs, rows;
    Share mine;
    float first_bias, first_gated_bias, first_addend;

    DEVICE Outputs(OUT* out_, int stride_, int outputs_, int rows_, Share mine_, const float* bias_)
        : out(out_), bias(bias_), stride(stride_), outputs(outputs_), rows(rows_), mine(mine_) {
        if (HAS_BIAS && threadIdx.x < rows * mine.count) {
            int o = mine.first + threadIdx.x - row_of(threadIdx.x) * mine.count;
            first_bias = __ldcg(bias + o);
            if (GATED) first_gated_bias = __ldcg(bias + outputs + o);
        }
    }

    DEVICE void load_addend() {
        if (EPILOGUE == ADD && threadIdx.x < rows * mine.count) first_addend = load_fresh_element(place(threadIdx.x));
    }

    // `scale(row)` is applied to the products of a row of x.
    template <typename Scale> DEVICE void write(const PartialSums& sums, const Scale& scale) const {
        for (int item = threadIdx.x; item < rows * mine.count; item += THREADS) {
            bool is_first = item < THREADS;
            int row = row_of(item), i = item - row * mine.count, o = mine.first + i;
            float factor = scale(row), value = factor * sums.sum(0, row, i);
            if (HAS_BIAS) value += is_first ? first_bias : __ldg(bias + o);
            if (GATED) {
                float up = factor * sums.sum(1, row, i);
                if (HAS_BIAS) up += is_first ? first_gated_bias : __ldg(bias + outputs + o);
                value = silu(value) * up;
            }
            if (EPILOGUE == ADD) value += is_first ? first_addend : load_fresh_element(place(item));
            *place(item) = from_float<OUT>(value);
        }
    }

    DEVICE int row_of(int item) const { return rows == 1 ? 0 : item / mine.count; }
    DEVICE OUT* place(int item) const {
        int row = row_of(item);
        return out + (long long)row * stride + mine.first + item - row * mine.count;
    }
};
