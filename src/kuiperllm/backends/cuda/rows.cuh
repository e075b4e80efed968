// What kernels that walk along rows share: a few neighbouring elements of any type as floats, and back.
#pragma once
#include "common.cuh"

// COUNT neighbouring elements. Where they fill vectors of 16 bytes, p must be aligned to 16 bytes; otherwise they are
// read one by one.
template <typename V, int COUNT> DEVICE void load(const V* p, float (&x)[COUNT]) {
    constexpr int STEP = COUNT % VECTOR<V> == 0 ? VECTOR<V> : 1;
#pragma unroll
    for (int i = 0; i < COUNT; i += STEP) {
        if constexpr (STEP == 1) {
            x[i] = to_float(p[i]);
        } else {
            float part[STEP];
            load_vector(p + i, part);
#pragma unroll
            for (int j = 0; j < STEP; j++) x[i + j] = part[j];
        }
    }
}

// The other way; the elements are rounded to nearest even.
template <typename V, int COUNT> DEVICE void store(V* p, const float (&x)[COUNT]) {
    constexpr int STEP = COUNT % VECTOR<V> == 0 ? VECTOR<V> : 1;
#pragma unroll
    for (int i = 0; i < COUNT; i += STEP) {
        if constexpr (STEP == 1) {
            p[i] = from_float<V>(x[i]);
        } else {
            float part[STEP];
#pragma unroll
            for (int j = 0; j < STEP; j++) part[j] = x[i + j];
            store_vector(p + i, part);
        }
    }
}
