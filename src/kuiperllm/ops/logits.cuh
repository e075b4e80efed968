// What kernels over rows of logits share: how blocks divide rows, how tokens are ordered, searching and sorting.
//
// All kernels that use this run blocks of ROW_THREADS threads.
#pragma once
#include "common.cuh"

typedef unsigned long long u64;

constexpr int ROW_THREADS = 512;
constexpr int ROW_WARPS = ROW_THREADS / 32;

struct MaxKey { DEVICE u64 operator()(u64 a, u64 b) const { return a > b ? a : b; } };
struct Min { DEVICE float operator()(float a, float b) const { return fminf(a, b); } };
struct SumMass { DEVICE u64 operator()(u64 a, u64 b) const { return a + b; } };

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }
DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// --- the order of tokens: by logit; of equal ones, the lower id is the greater ------------------------------------

constexpr unsigned ORDERED_MINUS_INFINITY = 0x007fffffu;

// Integers in the order of the floats: NaN is 0, below minus infinity, and both zeros are the same.
DEVICE unsigned ordered(float x) {
    unsigned bits = __float_as_uint(x + 0.f);
    if (x != x) return 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float from_ordered(unsigned order) {
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

// One integer for a token, different for each: its order above the complement of its id.
DEVICE u64 token_key(float x, int id) { return (u64)ordered(x) << 32 | ~(unsigned)id; }
DEVICE int key_id(u64 key) { return (int)~(unsigned)key; }
DEVICE float key_logit(u64 key) { return from_ordered((unsigned)(key >> 32)); }
DEVICE bool is_possible(u64 key) { return key >> 32 > ORDERED_MINUS_INFINITY; }

// --- rows as vectors of 16 bytes ----------------------------------------------------------------------------------

// A row may begin anywhere: vector 0 is the one that holds its first element, `skew` elements behind the vector's start.
struct Row {
    const float* x;
    int size, skew;

    DEVICE Row(const float* logits, long long row, long long stride, int width)
        : x(logits + row * stride), size(width), skew((int)((u64)x / sizeof(float) % 4)) {}

    DEVICE int vectors() const { return ceil_div(size + skew, 4); }
    DEVICE int first_id(int vector) const { return 4 * vector - skew; }

    // NaN, the least of all, where the row has no element.
    DEVICE float4 load(int vector) const {
        int id = first_id(vector);
        if (id >= 0 && id + 4 <= size) return *(const float4*)(x + id);
        return make_float4(load_one(id), load_one(id + 1), load_one(id + 2), load_one(id + 3));
    }
    DEVICE float load_one(int id) const { return id >= 0 && id < size ? x[id] : not_a_number(); }
};

// Part `index` of `count` equal parts of a row, for one warp: the vectors from `begin` up to `end`.
struct Span {
    int begin, end;

    DEVICE Span(const Row& row, int index, int count) {
        int length = ceil_div(ceil_div(row.vectors(), count), 32) * 32;
        begin = min((long long)index * length, (long long)row.vectors());
        end = min(begin + length, row.vectors());
    }
};

// The tokens of a span, spread over the lanes of a warp. The first ones are on their way when this has been made.
struct Tokens {
    static constexpr int BATCH = 4;  // vectors that a lane fetches at once
    const Row& row;
    int next, end;
    float4 x[BATCH];

    DEVICE Tokens(const Row& row_, Span span) : row(row_), next(span.begin + (threadIdx.x & 31)), end(span.end) { load(); }

    DEVICE void load() {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (next + 32 * i < end) x[i] = row.load(next + 32 * i);
        }
    }
    // Calls use(logit, id) for each; also for some beside the row: NaN.
    template <typename Use> DEVICE void for_each(Use use) {
        while (next < end) {
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int vector = next + 32 * i, id = row.first_id(vector);
                if (vector < end) use(x[i].x, id), use(x[i].y, id + 1), use(x[i].z, id + 2), use(x[i].w, id + 3);
            }
            next += 32 * BATCH;
            load();
        }
    }
};
template <typename Use> DEVICE void for_each_token(const Row& row, Span span, Use use) { Tokens(row, span).for_each(use); }

// --- across blocks ------------------------------------------------------------------------------------------------

// Whether this block is the last of `blocks` to call this; what the others wrote before is then visible to it.
// `arrived` is 0 before and after.
DEVICE bool is_last_block(unsigned* arrived, unsigned blocks, bool* scratch) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // for what the whole block wrote in front of the barrier
        *scratch = atomicAdd(arrived, 1u) == blocks - 1;
        if (*scratch) {
            *arrived = 0;
            __threadfence();
        }
    }
    __syncthreads();
    return *scratch;
}

// --- searching and sorting in a block -----------------------------------------------------------------------------

// Where a running sum reaches its goal: the item, and the sum of those in front of it. No item (-1): nowhere.
struct Crossing {
    int item;
    u64 before, total;
};

struct SearchScratch {
    u64 sums[ROW_WARPS];
    Crossing found;
};

// Thread t holds items t * N to t * N + N - 1. The first one up to which they add up to at least `goal` (above 0).
template <int N> DEVICE Crossing search(const u64 (&amount)[N], u64 goal, SearchScratch& scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 own = 0;
#pragma unroll
    for (int i = 0; i < N; i++) own += amount[i];
    u64 upto = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        u64 lower = __shfl_up_sync(WARP_ALL, upto, offset);
        if (lane >= offset) upto += lower;
    }
    __syncthreads();  // the scratch may still be read
    if (lane == 31) scratch.sums[warp] = upto;
    if (threadIdx.x == 0) scratch.found.item = -1;
    __syncthreads();
    u64 total = 0;
#pragma unroll
    for (int w = 0; w < ROW_WARPS; w++) {
        if (w < warp) upto += scratch.sums[w];
        total += scratch.sums[w];
    }
    u64 before = upto - own;
    if (before < goal && goal <= upto) {
        int item = threadIdx.x * N;
#pragma unroll
        for (int i = 0; i < N - 1; i++) {
            if (item == threadIdx.x * N + i && before + amount[i] < goal) before += amount[i], item++;
        }
        scratch.found = {item, before, total};
    }
    __syncthreads();
    Crossing found = scratch.found;
    found.total = total;
    return found;
}

// Sorts keys in shared memory, the largest first; `count` is a power of two.
DEVICE void sort_descending(u64* keys, int count) {  // Batcher's bitonic sort
    for (int size = 2; size <= count; size *= 2) {
        for (int stride = size / 2; stride; stride /= 2) {
            __syncthreads();
            for (int pair = threadIdx.x; pair < count / 2; pair += ROW_THREADS) {
                int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
                u64 a = keys[low], b = keys[high];
                bool descending = !(low & size);
                if (a < b == descending) keys[low] = b, keys[high] = a;
            }
        }
    }
    __syncthreads();
}
