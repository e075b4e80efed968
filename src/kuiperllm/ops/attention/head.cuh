// A head of one token, a row of D elements, in the registers of LANES neighbouring lanes. Each lane holds PAIRS elements of
// the first half of the row and the PAIRS elements D / 2 further on: the ones that rotary embedding pairs them with.
//
// T: type of activations; C: type of the cache; D: elements of a head; BLOCK: tokens in a block of the cache.
#pragma once
#include "rows.cuh"
#include "softmax.cuh"

constexpr int HALF = D / 2;
constexpr int WIDEST = VECTOR<T> > VECTOR<C> ? VECTOR<T> : VECTOR<C>;
constexpr int STEP = HALF % WIDEST == 0 ? WIDEST : 1;  // neighbours that a lane loads together: vectors of 16 bytes, or one

__host__ __device__ constexpr int lanes_for(int steps) {
    int lanes = 1;
    while (lanes < steps && lanes < 32) lanes *= 2;
    return lanes;
}
constexpr int STEPS = HALF / STEP;                  // in half a row
constexpr int LANES = lanes_for(STEPS);
constexpr int PARTS = (STEPS + LANES - 1) / LANES;  // steps of a lane
constexpr int PAIRS = PARTS * STEP;
constexpr int ROWS_PER_WARP = 32 / LANES;

// Where part `part` of lane `lane` begins within half a row, and whether there is such a part.
DEVICE int part_offset(int part, int lane) { return (part * LANES + lane) * STEP; }
DEVICE bool has_part(int part, int lane) { return STEPS % LANES == 0 || part * LANES + lane < STEPS; }

// STEP neighbouring elements as they lie in memory.
template <typename E, bool IS_VECTOR = (STEP > 1)> struct Neighbours {
    uint4 vector[STEP / VECTOR<E>];
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < STEP / VECTOR<E>; i++) vector[i] = make_uint4(0, 0, 0, 0);
    }
    DEVICE void load(const E* p) {
#pragma unroll
        for (int i = 0; i < STEP / VECTOR<E>; i++) vector[i] = __ldcg((const uint4*)p + i);
    }
    DEVICE void store(E* p) const {
#pragma unroll
        for (int i = 0; i < STEP / VECTOR<E>; i++) ((uint4*)p)[i] = vector[i];
    }
    DEVICE void get(float (&x)[STEP]) const {
#pragma unroll
        for (int i = 0; i < STEP; i += VECTOR<E>) {
            float part[VECTOR<E>];
            unpack(vector[i / VECTOR<E>], part, E());
#pragma unroll
            for (int j = 0; j < VECTOR<E>; j++) x[i + j] = part[j];
        }
    }
    DEVICE void set(const float (&x)[STEP]) {
#pragma unroll
        for (int i = 0; i < STEP; i += VECTOR<E>) {
            float part[VECTOR<E>];
#pragma unroll
            for (int j = 0; j < VECTOR<E>; j++) part[j] = x[i + j];
            vector[i / VECTOR<E>] = pack(part, E());
        }
    }
};
template <typename E> struct Neighbours<E, false> {
    E item;
    DEVICE void clear() { item = from_float<E>(0.f); }
    DEVICE void load(const E* p) { item = *p; }
    DEVICE void store(E* p) const { *p = item; }
    DEVICE void get(float (&x)[1]) const { x[0] = to_float(item); }
    DEVICE void set(const float (&x)[1]) { item = from_float<E>(x[0]); }
};

// A lane's elements of a row as they lie in memory.
template <typename E> struct Row {
    Neighbours<E> first[PARTS], second[PARTS];

    DEVICE void clear() {
#pragma unroll
        for (int p = 0; p < PARTS; p++) first[p].clear(), second[p].clear();
    }
    DEVICE void load(const E* row, int lane) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            if (has_part(p, lane)) {
                first[p].load(row + part_offset(p, lane));
                second[p].load(row + HALF + part_offset(p, lane));
            } else {
                first[p].clear(), second[p].clear();
            }
        }
    }
    DEVICE void store(E* row, int lane) const {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            if (has_part(p, lane)) {
                first[p].store(row + part_offset(p, lane));
                second[p].store(row + HALF + part_offset(p, lane));
            }
        }
    }
    DEVICE void get(float (&x)[2 * PAIRS]) const {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            float a[STEP], b[STEP];
            first[p].get(a), second[p].get(b);
#pragma unroll
            for (int i = 0; i < STEP; i++) x[p * STEP + i] = a[i], x[PAIRS + p * STEP + i] = b[i];
        }
    }
    DEVICE void set(const float (&x)[2 * PAIRS]) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            float a[STEP], b[STEP];
#pragma unroll
            for (int i = 0; i < STEP; i++) a[i] = x[p * STEP + i], b[i] = x[PAIRS + p * STEP + i];
            first[p].set(a), second[p].set(b);
        }
    }
};

// A lane's elements of a row as floats; those it does not have are 0.
template <typename E> DEVICE void load_row(const E* row, int lane, float (&x)[2 * PAIRS]) {
    Row<E> raw;
    raw.load(row, lane);
    raw.get(x);
}
// The same from shared memory.
DEVICE void read_shared_row(const float* row, int lane, float (&x)[2 * PAIRS]) {
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i += STEP) {
        int part = i % PAIRS / STEP;
        const float* from = row + (i < PAIRS ? 0 : HALF) + part_offset(part, lane);
        float piece[STEP];
        if (has_part(part, lane)) {
            ::load(from, piece);
        } else {
#pragma unroll
            for (int j = 0; j < STEP; j++) piece[j] = 0.f;
        }
#pragma unroll
        for (int j = 0; j < STEP; j++) x[i + j] = piece[j];
    }
}
template <typename E> DEVICE void store_row(E* row, int lane, const float (&x)[2 * PAIRS]) {
    Row<E> raw;
    raw.set(x);
    raw.store(row, lane);
}

// Root mean square norm of a row, all of whose lanes call this.
DEVICE void normalize_row(float (&x)[2 * PAIRS], const float (&weight)[2 * PAIRS], float eps) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) squares += x[i] * x[i];
    float factor = rsqrtf(warp_reduce<LANES>(squares, Sum()) * (1.f / D) + eps);
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) x[i] *= factor * weight[i];
}

// Rotary embedding; `turn` is a row of the table: cosines, then sines.
DEVICE void rotate_row(float (&x)[2 * PAIRS], const float (&turn)[2 * PAIRS]) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        float a = x[i], b = x[PAIRS + i];
        x[i] = a * turn[i] - b * turn[PAIRS + i];
        x[PAIRS + i] = a * turn[PAIRS + i] + b * turn[i];
    }
}

// What makes queries and keys of raw ones, in shared memory: the norms' weights, and the row of the rotary table for the
// token's position. All threads of a block load it, and synchronize before they use it.
struct Preparation {
    float turn[D], q_norm[D], k_norm[D];

    DEVICE void load_norms(const float* of_queries, const float* of_keys) {
        for (int i = threadIdx.x; i < D; i += blockDim.x) q_norm[i] = of_queries[i], k_norm[i] = of_keys[i];
    }
    DEVICE void load_turn(const float* row) {
        for (int i = threadIdx.x; i < D; i += blockDim.x) turn[i] = row[i];
    }
    DEVICE void normalize(float (&x)[2 * PAIRS], bool is_query, float eps, int lane) const {
        float weight[2 * PAIRS];
        read_shared_row(is_query ? q_norm : k_norm, lane, weight);
        normalize_row(x, weight, eps);
    }
    DEVICE void rotate(float (&x)[2 * PAIRS], int lane) const {
        float row[2 * PAIRS];
        read_shared_row(turn, lane, row);
        rotate_row(x, row);
    }
};

// Where the row of key/value head `head` of a token lies in a cache: [blocks, heads, BLOCK, D].
DEVICE long long cached_row(int block, int place, int head, int num_kv_heads) {
    return (((long long)block * num_kv_heads + head) * BLOCK + place) * D;
}
DEVICE long long slot_row(long long slot, int head, int num_kv_heads) {
    return cached_row((int)(slot / BLOCK), (int)(slot % BLOCK), head, num_kv_heads);
}
