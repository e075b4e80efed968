// Attention of many tokens, on tensor cores (FlashAttention-2, Dao 2023, arXiv:2307.08691): a block takes 16 * WARPS query
// rows of one sequence and key/value head, each warp 16 of them, and goes through the keys they may see, KEYS at a time,
// while the next ones come. Row r of a sequence is head r % GROUP of the group at its token r / GROUP of this pass.
//
//   T, D, BLOCK   as in tiles.cuh
//   GROUP         query heads of a key/value head
//   WARPS, KEYS
#include "tiles.cuh"

constexpr int TILE = KEYS * ROW;  // elements of a tile of keys; the values follow
constexpr int ROWS = 16 * WARPS;

// Queue the copies of keys first ... first + KEYS - 1 and their values; zeros from `end` on.
DEVICE void load_keys(T* to, const T* keys, const T* values, const int* table, int first, int end, int kv_head, int num_kv_heads) {
#pragma unroll 4
    for (int i = threadIdx.x; i < KEYS * UNITS; i += WARPS * 32) {
        int row = i / UNITS, unit = i % UNITS, token = min(first + row, end - 1);
        long long at = (((long long)__ldg(table + token / BLOCK) * num_kv_heads + kv_head) * BLOCK + token % BLOCK) * D;
        copy_unit(to, row, unit, keys + at, first + row < end);
        copy_unit(to + TILE, row, unit, values + at, first + row < end);
    }
    commit_copies();
}

// If `skip_single`, sequences with one new token are left to another kernel.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
prefill_mma(const T* q, const T* keys, const T* values, const int* block_table, const int* query_start, const int* seq_lens,
            T* out, int num_kv_heads, int skip_single, long long q_token, long long q_head, long long out_token,
            long long out_head, long long table_row, float scale) {
    T* tiles = (T*)shared_memory;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, kv_head = blockIdx.y, sequence = blockIdx.z;
    int first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the longest ones start first

    launch_next();
    wait_for_previous();
    int start = query_start[sequence], query_len = query_start[sequence + 1] - start, rows = query_len * GROUP;
    if (first_row >= rows || (skip_single && query_len == 1)) return;
    int before = seq_lens[sequence] - query_len;  // tokens that were there already
    int end = before + min((first_row + ROWS - 1) / GROUP, query_len - 1) + 1;
    const int* table = block_table + sequence * table_row;
    load_keys(tiles, keys, values, table, 0, end, kv_head, num_kv_heads);

    // This lane's two rows; rows past the end are computed like the last one and thrown away.
    int row[2] = {first_row + warp * 16 + lane / 4, first_row + warp * 16 + lane / 4 + 8}, last_seen[2];
    unsigned queries[STEPS_D][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int real = min(row[r], rows - 1);
        last_seen[r] = before + real / GROUP;
        const T* own = q + (start + real / GROUP) * q_token + (kv_head * GROUP + real % GROUP) * q_head + 2 * (lane & 3);
#pragma unroll
        for (int step = 0; step < STEPS_D; step++) {
            queries[step][r] = *(const unsigned*)(own + step * 16);
            queries[step][r + 2] = D % 16 == 0 || step * 16 + 8 < D ? *(const unsigned*)(own + step * 16 + 8) : 0;
        }
    }
    int warp_first = before + min(first_row + warp * 16, rows - 1) / GROUP, warp_last = before + min(first_row + warp * 16 + 15, rows - 1) / GROUP;

    Softmax softmax;
    float mixed[COLUMNS / 8][4];
    clear(mixed);
    for (int first = 0, stage = 0; first < end; first += KEYS, stage ^= 1) {
        T* tile = tiles + stage * 2 * TILE;
        if (first + KEYS < end) load_keys(tiles + (stage ^ 1) * 2 * TILE, keys, values, table, first + KEYS, end, kv_head, num_kv_heads);
        else commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        if (first <= warp_last) {
            float scores[KEYS / 8][4];
            clear(scores);
            multiply_keys<KEYS>(scores, queries, tile);
            if (first + KEYS - 1 > warp_first) {
#pragma unroll
                for (int i = 0; i < KEYS / 8; i++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        if (first + i * 8 + 2 * (lane & 3) + (j & 1) > last_seen[j >> 1]) scores[i][j] = LOWEST / LOG2_E;
                    }
                }
            }
            softmax.weigh<KEYS>(scores, mixed, scale * LOG2_E);
            multiply_values<KEYS>(mixed, scores, tile + TILE);
        }
        __syncthreads();
    }
    softmax.finish();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (row[r] < rows) {
            float inverse = 1.f / softmax.sum[r];
            T* to = out + (start + row[r] / GROUP) * out_token + (kv_head * GROUP + row[r] % GROUP) * out_head + 2 * (lane & 3);
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *(unsigned*)(to + i * 8) = pack2<T>(mixed[i][2 * r] * inverse, mixed[i][2 * r + 1] * inverse);
        }
    }
}
