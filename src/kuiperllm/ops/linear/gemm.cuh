// What the matrix products have in common: the order of tiles, the rows of W that a tile takes, and writing results.
//
// EPILOGUE 0: Y = product. 1: Y += product. 2: Y[M, F] = silu(gate) * up, where W = [F gate rows; F up rows].
// BIAS 1: a bias for each row of W is added to the product. OUT: the type of Y.
#pragma once
#include "common.cuh"

constexpr bool GATED = EPILOGUE == 2;

struct Tile { int p, q; };

// Tile `index` of tiles_p x tiles_q: columns of `raster` tiles along p, walked down p first, so that tiles that are worked
// on at a time share rows in the cache.
DEVICE Tile tile_at(int index, int tiles_p, int tiles_q, int raster) {
    int column = index / (raster * tiles_q), first = column * raster, width = min(raster, tiles_p - first);
    int rest = index - first * tiles_q, q = rest / width;
    return {first + rest - q * width, q};
}

DEVICE float gated(float gate, float up) { return silu(gate) * up; }

// The bias of column n of Y, or, with `up`, of the row of W that is multiplied with it; 0 where there is none.
DEVICE float bias_at(const float* bias, int width, int n, int up = 0) { return BIAS && n < width ? __ldg(bias + n + up * width) : 0.f; }

// Y [rows, width], its rows `stride` elements apart.
struct Result {
    OUT* start;
    long long stride;
    int rows, width;
    bool paired;  // two neighbours may be written at once

    DEVICE Result(OUT* start_, long long stride_, int rows_, int width_) : start(start_), stride(stride_), rows(rows_), width(width_) {
        paired = ((unsigned long long)start | stride * sizeof(OUT)) % (2 * sizeof(OUT)) == 0;
    }
    DEVICE void put(int m, int n, float value) const {
        if (m >= rows || n >= width) return;
        OUT* at = start + m * stride + n;
        *at = from_float<OUT>(EPILOGUE == 1 ? value + to_float(*at) : value);
    }
    // Columns n, which is even, and n + 1.
    DEVICE void put(int m, int n, float low, float high) const {
        if (!paired || n + 1 >= width) {
            put(m, n, low);
            put(m, n + 1, high);
        } else if (m < rows) {
            auto* at = (Pack<OUT, 2>*)(start + m * stride + n);
            if (EPILOGUE == 1) {
                const Pack<OUT, 2> old = *at;
                low += to_float(old.item[0]), high += to_float(old.item[1]);
            }
            *at = {from_float<OUT>(low), from_float<OUT>(high)};
        }
    }
};
