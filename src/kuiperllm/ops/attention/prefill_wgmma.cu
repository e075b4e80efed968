// Attention of many tokens on Hopper (after FlashAttention-3, Shah et al. 2024, arXiv:2407.08608): one warp copies tiles of
// keys and values from the pages of the cache; two warpgroups each take 64 query tokens of one head. A warpgroup multiplies
// queries by the keys of one tile and weights by the values of the tile before at the same time, and the two warpgroups take
// turns, so that the tensor cores of one work while the other is at its softmax.
//
//   T           bf16 or f16
//   D           elements of a head: 64 or 128
//   BLOCK       tokens in a block of the cache, which divides 128 or is a multiple of it
//   STAGES      tiles of keys, and of values, in shared memory or on their way there
//
// Tiles lie in shared memory as columns of 64 elements: rows of 128 bytes, swizzled, those of the next 64 elements behind.
#include "hopper.cuh"
#include "softmax.cuh"

constexpr int QUERIES = 128, KEYS = 128;
constexpr int COLUMNS = D / 64;
constexpr int COLUMN_BYTES = 128 * 128;             // 128 rows, of queries as of keys and values
constexpr int TILE_BYTES = COLUMNS * COLUMN_BYTES;
constexpr int BOX = BLOCK < KEYS ? BLOCK : KEYS;    // rows that one copy brings
constexpr int COPIES = KEYS / BOX * COLUMNS;        // of a tile, one for each lane
constexpr int CONSUMER_WARPS = 8;
constexpr int TURN = 1, ALONE = 3;                  // barriers of warpgroups, two each
static_assert(D % 64 == 0 && D <= 128 && KEYS % BOX == 0 && BLOCK % BOX == 0, "shape");

// Where things lie in shared memory.
struct Layout {
    unsigned queries, keys, values, queries_full, keys_full, keys_empty, values_full, values_empty;
    DEVICE Layout() {
        queries = (shared_address(shared_memory) + 1023) & ~1023u;
        keys = queries + TILE_BYTES;
        values = keys + STAGES * TILE_BYTES;
        queries_full = values + STAGES * TILE_BYTES;
        keys_full = queries_full + 8;
        keys_empty = keys_full + 8 * STAGES;
        values_full = keys_empty + 8 * STAGES;
        values_empty = values_full + 8 * STAGES;
    }
};

// The query tokens of a block, and the keys that they see.
struct Work {
    int start, query_len, seq_len, first, before, end, tiles;

    DEVICE Work(const int* query_start, const int* seq_lens) {
        int sequence = blockIdx.z;
        start = query_start[sequence];
        query_len = query_start[sequence + 1] - start;
        seq_len = seq_lens[sequence];
        first = (gridDim.y - 1 - blockIdx.y) * QUERIES;  // the longest ones start first
        before = seq_len - query_len;                    // tokens that were there already
        end = before + min(first + QUERIES, query_len);
        tiles = ceil_div(end, KEYS);
    }
};

// Which tile a stage holds, and the parity of the phase of its barriers that ends when it has come.
DEVICE unsigned stage_of(int tile) { return tile % STAGES; }
DEVICE unsigned parity_of(int tile) { return tile / STAGES & 1; }

// --- the warp that copies --------------------------------------------------------------------------------------------------

// Each lane brings one box of a tile. Boxes past the end are asked for outside of the cache, which gives zeros.
struct Copier {
    const int* table;
    int end, kv_head, num_kv_heads, outside, box, column;
    bool copies;

    DEVICE int row_of(int tile) const {
        int token = tile * KEYS + box * BOX;
        if (!copies || token >= end) return outside;
        return (table[token / BLOCK] * num_kv_heads + kv_head) * BLOCK + token % BLOCK;
    }
    DEVICE void load(unsigned tiles, unsigned full, unsigned empty, const TensorMap* map, int tile, int row) const {
        unsigned stage = stage_of(tile), barrier = full + 8 * stage;
        wait_barrier(empty + 8 * stage, parity_of(tile) ^ 1);
        if ((threadIdx.x & 31) == 0) arrive_expecting(barrier, TILE_BYTES);
        __syncwarp();
        if (copies) load_tile(tiles + stage * TILE_BYTES + column * COLUMN_BYTES + box * BOX * 128, map, barrier, EVICT_NORMAL, column * 64, row);
    }
};

// --- the warpgroups that multiply ------------------------------------------------------------------------------------------

// scores[64 x KEYS] = queries keys^T, not waited for. A step of 16 elements is 32 bytes of a swizzled row.
DEVICE void multiply_keys(float (&scores)[KEYS / 2], unsigned queries, unsigned keys) {
    begin_products();
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        unsigned at = step / 4 * COLUMN_BYTES + step % 4 * 32;
        wgmma<T>(scores, matrix_descriptor(queries + at), matrix_descriptor(keys + at), step > 0);
    }
    commit_products();
}
// mixed[64 x D] += weights values, not waited for. A step of 16 tokens is 16 rows of each column.
DEVICE void multiply_values(float (&mixed)[D / 2], const unsigned (&weights)[KEYS / 16][4], unsigned values) {
    begin_products();
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++)
        wgmma<T, 1>(mixed, weights[step], matrix_descriptor(values + step * 16 * 128, 1024, COLUMN_BYTES));
    commit_products();
}

// Scores of this thread's rows for keys from `first` on that lie behind its tokens (at `place` and `place` + 8).
DEVICE void mask(float (&scores)[KEYS / 2], int first, int place) {
    int key = first + 2 * (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        if (key + i / 4 * 8 + i % 2 > place + i % 4 / 2 * 8) scores[i] = -__uint_as_float(0x7f800000);
    }
}

// The running softmax of this thread's two rows; `top` in units of scores, `sum` of this thread's columns alone.
struct Softmax {
    float top[2], sum[2];

    // Scores become weights. What has been mixed so far must be scaled by `shrink`.
    DEVICE void weigh(float (&scores)[KEYS / 2], float (&shrink)[2], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float highest = top[r];
#pragma unroll
            for (int i = 2 * r; i < KEYS / 2; i += 4) highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
            highest = warp_reduce<4>(highest, Max());
            float base = highest * scale, total = 0.f;
            shrink[r] = exp2_approx(top[r] * scale - base);
            top[r] = highest;
#pragma unroll
            for (int i = 2 * r; i < KEYS / 2; i += 4) {
                scores[i] = exp2_approx(scores[i] * scale - base);
                scores[i + 1] = exp2_approx(scores[i + 1] * scale - base);
                total += scores[i] + scores[i + 1];
            }
            sum[r] = sum[r] * shrink[r] + total;
        }
    }
};

// Accumulators of a product are, rounded, rows of the next one's left operand.
DEVICE void round_weights(unsigned (&weights)[KEYS / 16][4], const float (&scores)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) weights[i / 4][i % 4] = pack2<T>(scores[2 * i], scores[2 * i + 1]);
}

// Values of tokens that do not exist yet are whatever was in the cache; weights of 0 do not keep NaN out of the sums.
DEVICE void clear_rows(unsigned values, int from, int to, int group) {
    for (int i = threadIdx.x & 127; i < (to - from) * 8 * COLUMNS; i += 128) {
        unsigned row = values + i / 8 % COLUMNS * COLUMN_BYTES + (from + i / (8 * COLUMNS)) * 128;
        store_shared(row + i % 8 * 16, make_float4(0.f, 0.f, 0.f, 0.f));
    }
    fence_async();
    sync_warpgroup(ALONE + group);
}

// One warp's 16 rows through shared memory, so that whole rows leave at once.
DEVICE void store_rows(const float (&mixed)[D / 2], unsigned rows, T* out, int count, long long out_token) {
    int lane = threadIdx.x & 31, row = (lane >> 3 & 1) * 8 + (lane & 7);
#pragma unroll
    for (int i = 0; i < D / 2; i += 8) {
        int unit = i / 4 + (lane >> 4);
        store_matrices(rows + unit / 8 * COLUMN_BYTES + row * 128 + ((unit ^ row) & 7) * 16, pack2<T>(mixed[i], mixed[i + 1]),
                       pack2<T>(mixed[i + 2], mixed[i + 3]), pack2<T>(mixed[i + 4], mixed[i + 5]), pack2<T>(mixed[i + 6], mixed[i + 7]));
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * D / 8; i += 32) {
        int row = i / (D / 8), unit = i % (D / 8);
        if (row < count) {
            float4 piece = load_shared(rows + unit / 8 * COLUMN_BYTES + row * 128 + ((unit ^ row) & 7) * 16);
            *(float4*)(out + row * out_token + unit * 8) = piece;
        }
    }
}

// If `skip_single`, sequences with one new token are left to another kernel. `outside`: rows of the cache's tensor.
extern "C" __global__ void __launch_bounds__(384, 1)
prefill_wgmma(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values,
              const int* block_table, const int* query_start, const int* seq_lens, T* out, int num_kv_heads, int skip_single,
              int outside, long long out_token, long long out_head, long long table_row, float scale) {
    const Layout at;
    int head = blockIdx.x, kv_head = head / (gridDim.x / num_kv_heads), group = threadIdx.x / 128;
    launch_next();
    if (threadIdx.x == 0) {
        prefetch_map(&q), prefetch_map(&keys), prefetch_map(&values);
        init_barrier(at.queries_full, 1);
        for (int i = 0; i < STAGES; i++) {
            init_barrier(at.keys_full + 8 * i, 1), init_barrier(at.keys_empty + 8 * i, CONSUMER_WARPS);
            init_barrier(at.values_full + 8 * i, 1), init_barrier(at.values_empty + 8 * i, CONSUMER_WARPS);
        }
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous();
    const Work work(query_start, seq_lens);
    if (work.first >= work.query_len || (skip_single && work.query_len == 1)) return;

    if (group == 2) {  // copies
        shrink_registers<24>();
        if (threadIdx.x >= 256 + 32) return;
        int lane = threadIdx.x & 31;
        Copier copier{block_table + blockIdx.z * table_row, work.end, kv_head, num_kv_heads, outside, lane / COLUMNS % (KEYS / BOX), lane % COLUMNS, lane < COPIES};
        if (lane == 0) {
            arrive_expecting(at.queries_full, TILE_BYTES);
            for (int column = 0; column < COLUMNS; column++)
                load_tile(at.queries + column * COLUMN_BYTES, &q, at.queries_full, EVICT_NORMAL, column * 64, head, work.start + work.first);
        }
        int row = copier.row_of(0);
        for (int tile = 0; tile < work.tiles; tile++) {
            copier.load(at.keys, at.keys_full, at.keys_empty, &keys, tile, row);
            int next = copier.row_of(tile + 1);
            copier.load(at.values, at.values_full, at.values_empty, &values, tile, row);
            row = next;
        }
        return;
    }

    grow_registers<240>();
    int warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
    int place = work.before + work.first + group * 64, own_place = place + warp * 16 + lane / 4;
    unsigned own_queries = at.queries + group * 64 * 128;
    auto wait_for_keys = [&](int tile) { if (tile < work.tiles) wait_barrier(at.keys_full + 8 * stage_of(tile), parity_of(tile)); };
    auto release = [&](unsigned empty, int tile) { if (lane == 0) arrive(empty + 8 * stage_of(tile)); };

    float scores[KEYS / 2], mixed[D / 2], shrink[2];
    unsigned weights[KEYS / 16][4];
    Softmax softmax{{-__uint_as_float(0x7f800000), -__uint_as_float(0x7f800000)}, {0.f, 0.f}};
    scale *= LOG2_E;
#pragma unroll
    for (int i = 0; i < D / 2; i++) mixed[i] = 0.f;

    wait_barrier(at.queries_full, 0);
    wait_for_keys(0);
    multiply_keys(scores, own_queries, at.keys);
    if (group == 1 && work.tiles > 1) give_turn(TURN);
    wait_for_products<0>();
    hold(scores);
    release(at.keys_empty, 0);
    if (KEYS - 1 > place) mask(scores, 0, own_place);
    softmax.weigh(scores, shrink, scale);
    round_weights(weights, scores);

    wait_for_keys(1);
    for (int tile = 1; tile < work.tiles; tile++) {
        wait_for_turn(TURN + group);
        multiply_keys(scores, own_queries, at.keys + stage_of(tile) * TILE_BYTES);
        wait_barrier(at.values_full + 8 * stage_of(tile - 1), parity_of(tile - 1));
        multiply_values(mixed, weights, at.values + stage_of(tile - 1) * TILE_BYTES);
        if (group == 0 || tile + 1 < work.tiles) give_turn(TURN + (group ^ 1));
        wait_for_products<1>();
        hold(scores);
        release(at.keys_empty, tile);
        if (tile * KEYS + KEYS - 1 > place) mask(scores, tile * KEYS, own_place);
        softmax.weigh(scores, shrink, scale);
        wait_for_keys(tile + 1);  // here, so that no compiler moves the softmax behind the wait for the other product
        wait_for_products<0>();
        hold(mixed);
        release(at.values_empty, tile - 1);
#pragma unroll
        for (int i = 0; i < D / 2; i++) mixed[i] *= shrink[i / 2 % 2];
        round_weights(weights, scores);
    }

    int last = work.tiles - 1;
    unsigned last_values = at.values + stage_of(last) * TILE_BYTES;
    wait_barrier(at.values_full + 8 * stage_of(last), parity_of(last));
    int copied = ceil_div(work.end, BOX) * BOX;  // the tokens of all boxes; behind them are zeros
    if (work.seq_len < copied) clear_rows(last_values, work.seq_len - last * KEYS, copied - last * KEYS, group);
    multiply_values(mixed, weights, last_values);
    wait_for_products<0>();
    hold(mixed);

#pragma unroll
    for (int r = 0; r < 2; r++) {
        float inverse = 1.f / warp_reduce<4>(softmax.sum[r], Sum());
#pragma unroll
        for (int i = 2 * r; i < D / 2; i += 4) mixed[i] *= inverse, mixed[i + 1] *= inverse;
    }
    sync_warpgroup(ALONE + group);  // no product reads the queries' memory any more
    int first = work.first + group * 64 + warp * 16;
    store_rows(mixed, own_queries + warp * 16 * 128, out + (work.start + first) * out_token + head * out_head, work.query_len - first, out_token);
}
