// Constants of gemm_wgmma.cu, where the template parameters are explained, and how its results leave the block.
#pragma once
#include "gemm.cuh"
#include "hopper.cuh"

// The kernel says: STEP, the columns of K in a stage, and P_BYTES, what a stage holds of P.
constexpr int GROUPS = TILE_P / 64;      // warpgroups that multiply
constexpr int ACCUMULATORS = TILE_Q / 2; // of a thread
constexpr int Q_BYTES = TILE_Q * STEP * 2, STAGE_BYTES = P_BYTES + Q_BYTES;
constexpr bool SHARING = CLUSTER > 1 && SPLIT != 2;
constexpr int ROWS_P = SHARING && SHARE_P ? TILE_P / CLUSTER : TILE_P;    // that one block copies
constexpr int ROWS_Q = SHARING && !SHARE_P ? TILE_Q / CLUSTER : TILE_Q;

// Results leave in chunks through two buffers of each warpgroup: 64 rows of P by CHUNK columns of Q.
constexpr int CHUNK = TILE_Q % 64 == 0 ? 64 : SWAP ? TILE_Q : TILE_Q % 32 == 0 ? 32 : 16;
constexpr int CHUNK_BYTES = 64 * CHUNK * 2;
constexpr int CHUNKS = TILE_Q / CHUNK / (GATED && !SWAP ? 2 : 1);
constexpr int PARTIAL_BYTES = SPLIT == 2 ? TILE_P * TILE_Q * 4 : 0;       // sums from another block of the cluster
constexpr int PARTIALS_AT = STAGES * STAGE_BYTES + (DIRECT ? 0 : GROUPS * 2 * CHUNK_BYTES);
constexpr int BARRIERS_AT = PARTIALS_AT + (CLUSTER - 1) * PARTIAL_BYTES;

static_assert(TILE_P % 64 == 0 && TILE_Q % 16 == 0 && ROWS_P % 8 == 0 && ROWS_Q % 8 == 0, "tile");
static_assert(SWAP || EPILOGUE == 0 || TILE_Q % (GATED ? 128 : 64) == 0, "tile of a fused epilogue");
static_assert(!SWAP || TILE_Q <= 64 || TILE_Q % 64 == 0, "tile");

// --- results -----------------------------------------------------------------------------------------------------------------

// A warpgroup's part of a tile begins at column x, row y of Y. Its accumulators acc[4 j + i] are, with g = lane / 4 and
// t = lane % 4, of row 16 warp + g + 8 (i / 2) along P and row 8 j + 2 t + i % 2 along Q. With EPILOGUE 2, gate and up rows
// of W alternate by eights.

DEVICE void add_bias(float (&acc)[ACCUMULATORS], const float* bias, int width, int x, int warp, int lane) {
    if (SWAP) {
        const int n = x + warp * (GATED ? 8 : 16) + lane / 4;
        const float low = bias_at(bias, width, n), high = bias_at(bias, width, GATED ? n : n + 8, GATED);
#pragma unroll
        for (int i = 0; i < ACCUMULATORS; i += 4) acc[i] += low, acc[i + 1] += low, acc[i + 2] += high, acc[i + 3] += high;
    } else {
#pragma unroll
        for (int j = 0; j < TILE_Q / 8; j++) {
            const int n = x + (GATED ? j / 2 : j) * 8 + lane % 4 * 2, up = GATED ? j % 2 : 0;
            const float low = bias_at(bias, width, n, up), high = bias_at(bias, width, n + 1, up);
            acc[4 * j] += low, acc[4 * j + 1] += high, acc[4 * j + 2] += low, acc[4 * j + 3] += high;
        }
    }
}

// DIRECT: every thread writes its own elements.
DEVICE void write_direct(const float (&acc)[ACCUMULATORS], const Result& result, int x, int y, int warp, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < TILE_Q / 8; j += GATED && !SWAP ? 2 : 1) {
        const float* a = acc + 4 * j;
        if (SWAP) {
            const int m = y + 8 * j + 2 * t, n = x + warp * (GATED ? 8 : 16) + g;
            if (GATED) {
                result.put(m, n, gated(a[0], a[2]));
                result.put(m + 1, n, gated(a[1], a[3]));
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) result.put(m + i % 2, n + i / 2 * 8, a[i]);
            }
        } else {
            const int m = y + 16 * warp + g, n = x + (GATED ? 4 : 8) * j + 2 * t;
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                if (GATED) result.put(m + 4 * i, n, gated(a[i], a[4 + i]), gated(a[i + 1], a[5 + i]));
                else result.put(m + 4 * i, n, a[i], a[i + 1]);
            }
        }
    }
}

// Four neighbouring pairs of the chunk at `row`, added to what lies there if it is to be, in T.
DEVICE void stage_matrices(unsigned row, const float* a) {
    float2 old[4] = {};
    if (EPILOGUE == 1) {
        unsigned r[4];
        if (SWAP) load_matrices_transposed(r, row);
        else load_matrices(r, row);
#pragma unroll
        for (int i = 0; i < 4; i++) old[i] = unpack2<T>(r[i]);
    }
    unsigned v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = pack2<T>(a[2 * i] + old[i].x, a[2 * i + 1] + old[i].y);
    if (SWAP) store_matrices_transposed(row, v[0], v[1], v[2], v[3]);
    else store_matrices(row, v[0], v[1], v[2], v[3]);
}

// Chunk c to its buffer, in the order that the map of Y has: rows of Y of 128, 64 or 32 bytes, swizzled by that width.
DEVICE void stage_chunk(const float (&acc)[ACCUMULATORS], unsigned buffer, int c, int warp, int lane) {
    const int matrix = lane / 8, r = lane % 8;
    if (!SWAP && !GATED) {
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j += 2) {
            const int row = warp * 16 + (matrix & 1) * 8 + r, column = j + (matrix >> 1);
            const int swizzle = CHUNK == 64 ? row & 7 : CHUNK == 32 ? (row >> 1) & 3 : (row >> 2) & 1;
            stage_matrices(buffer + row * (CHUNK * 2) + ((column ^ swizzle) << 4), acc + (c * (CHUNK / 8) + j) * 4);
        }
    } else if (!SWAP) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float* a = acc + (c * 16 + j * 2) * 4;
            float value[8];
#pragma unroll
            for (int i = 0; i < 4; i++) value[i] = gated(a[i], a[4 + i]), value[4 + i] = gated(a[8 + i], a[12 + i]);
            const int row = warp * 16 + (matrix & 1) * 8 + r, column = j + (matrix >> 1);
            stage_matrices(buffer + row * 128 + ((column ^ (row & 7)) << 4), value);
        }
    } else if (!GATED) {
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j += 2) {
            const int row = (j + (matrix >> 1)) * 8 + r, column = warp * 2 + (matrix & 1);
            stage_matrices(buffer + row * 128 + ((column ^ (row & 7)) << 4), acc + (c * (CHUNK / 8) + j) * 4);
        }
    } else {
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j += 2) {
            const float* a = acc + (c * (CHUNK / 8) + j) * 4;
            const int row = (j + (matrix & 1)) * 8 + r;
            store_matrices_transposed(buffer + row * 64 + ((warp ^ ((row >> 1) & 3)) << 4), pack2<T>(gated(a[0], a[2]), gated(a[1], a[3])),
                                      pack2<T>(gated(a[4], a[6]), gated(a[5], a[7])));
        }
    }
}

// The chunks of a warpgroup on their way out, and those of Y that are added to on their way in. Buffers alternate, also
// from one tile to the next.
struct Chunks {
    const TensorMap* map;
    unsigned staging, barriers, next = 0, parities = 0;
    int group, thread;

    DEVICE unsigned buffer(int c) const { return (next + c) & 1; }
    DEVICE void fetch(int c, int x, int y) {  // one thread
        const unsigned b = buffer(c);
        wait_for_stores<0>();
        arrive_expecting(barriers + 8 * b, CHUNK_BYTES);
        if (SWAP) load_tile(staging + b * CHUNK_BYTES, map, barriers + 8 * b, EVICT_NORMAL, x, y + c * CHUNK);
        else load_tile(staging + b * CHUNK_BYTES, map, barriers + 8 * b, EVICT_NORMAL, x + c * CHUNK, y);
    }
    DEVICE void fetch_first(int x, int y) {
        if (thread != 0) return;
        fetch(0, x, y);
        if (CHUNKS > 1) fetch(1, x, y);
    }
    DEVICE void write(const float (&acc)[ACCUMULATORS], int x, int y, int warp, int lane) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const unsigned b = buffer(c), at = staging + b * CHUNK_BYTES;
            if (EPILOGUE == 1) {
                wait_barrier(barriers + 8 * b, (parities >> b) & 1);
                parities ^= 1 << b;
            } else {
                if (thread == 0) wait_for_stores<1>();
                sync_warpgroup(group + 1);
            }
            stage_chunk(acc, at, c, warp, lane);
            fence_async();
            sync_warpgroup(group + 1);
            if (thread == 0) {
                if (SWAP) store_tile(map, at, x, y + c * CHUNK);
                else store_tile(map, at, x + c * CHUNK, y);
                if (EPILOGUE == 1 && c + 2 < CHUNKS) fetch(c + 2, x, y);
            }
        }
        next = (next + CHUNKS) & 1;
    }
};
