// Attention of single tokens: a block takes HEADS query heads of one token that share a key/value head, and one part of the
// context. Each LANES lanes of it look at every (WARPS * ROWS_PER_WARP)-th token of the part, BATCH of them at a time.
//
//   T, C, D, BLOCK  as in head.cuh
//   HEADS           query heads of a block: 1 is fastest where there is little to read, all of a group where there is much
//   WARPS, BATCH    warps of a block; tokens that a lane has under way
//   ONE_EACH        1: token s is the newest one of sequence s. 0: any tokens; the block looks up what sequence is theirs
//   FUSED           1: q holds raw queries, keys and values of the new tokens side by side. They are normalized (if there
//                   are norms) and rotated here, and one block of each key/value head writes the new key and value to the
//                   cache. All blocks attend to their own copies, so none waits for another
//   LATE            0: the kernel behind this one may start at once. 1: when keys and values have been asked for, so that its
//                   copies do not come first
//   AHEAD           1: lengths, positions, the table and earlier keys and values may be read before the kernel in front ends
//
// Results of part i of token t, divided by the sum of their weights: out[t * out_token + i * out_part + h * out_head]. If the
// context has several parts, `stats` [tokens, parts, heads] gets the largest score (times log2 e) and the sum of weights
// relative to it; (LOWEST, 0) and zeros for a part without tokens.
#include "head.cuh"

constexpr int AT_ONCE = WARPS * ROWS_PER_WARP;  // tokens that a block looks at side by side

// What a lane has seen of the context for one query head.
struct Seen {
    float top, sum, mixed[2 * PAIRS];
};

struct Batch {
    Row<C> keys[BATCH], values[BATCH];

    // Tokens first, first + AT_ONCE, ... before `end`; those from `cached` on are not in the cache yet.
    DEVICE void load(const C* all_keys, const C* all_values, const int* table, int first, int end, int cached, int head,
                     int num_kv_heads, int lane) {
        int block[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) block[i] = __ldg(table + max(min(first + i * AT_ONCE, end - 1), 0) / BLOCK);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int token = first + i * AT_ONCE;
            if (token < end && token < cached) {
                long long row = cached_row(block[i], token % BLOCK, head, num_kv_heads);
                keys[i].load(all_keys + row, lane);
                values[i].load(all_values + row, lane);
            } else {
                keys[i].clear(), values[i].clear();
            }
        }
    }
    // Put a key and a value that are not in the cache where they belong.
    DEVICE void insert(const Row<C>& key, const Row<C>& value, int first, int at) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (first + i * AT_ONCE == at) keys[i] = key, values[i] = value;
        }
    }
    DEVICE void attend(const float (&query)[2 * PAIRS], Seen& seen, int first, int end) const {
        float score[BATCH], top = seen.top;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            float key[2 * PAIRS], sum[2] = {0.f, 0.f};
            keys[i].get(key);
#pragma unroll
            for (int j = 0; j < PAIRS; j++) sum[0] += query[j] * key[j], sum[1] += query[PAIRS + j] * key[PAIRS + j];
            score[i] = sum[0] + sum[1];
        }
#pragma unroll
        for (int offset = LANES / 2; offset; offset >>= 1) {
#pragma unroll
            for (int i = 0; i < BATCH; i++) score[i] += __shfl_xor_sync(WARP_ALL, score[i], offset);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (first + i * AT_ONCE < end) top = fmaxf(top, score[i]);
        }
        float shrink = exp2_approx(seen.top - top);
        seen.top = top;
        seen.sum *= shrink;
#pragma unroll
        for (int j = 0; j < 2 * PAIRS; j++) seen.mixed[j] *= shrink;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            float weight = first + i * AT_ONCE < end ? exp2_approx(score[i] - top) : 0.f, value[2 * PAIRS];
            values[i].get(value);
            seen.sum += weight;
#pragma unroll
            for (int j = 0; j < 2 * PAIRS; j++) seen.mixed[j] += weight * value[j];
        }
    }
};

// What the rows of a warp have seen, together; every row gets the result.
DEVICE void merge_rows(Seen& seen) {
#pragma unroll
    for (int offset = LANES; offset < 32; offset <<= 1) {
        float other = __shfl_xor_sync(WARP_ALL, seen.top, offset), top = fmaxf(seen.top, other);
        float mine = exp2_approx(seen.top - top), theirs = exp2_approx(other - top);
        seen.top = top;
        seen.sum = seen.sum * mine + __shfl_xor_sync(WARP_ALL, seen.sum, offset) * theirs;
#pragma unroll
        for (int j = 0; j < 2 * PAIRS; j++) {
            seen.mixed[j] = seen.mixed[j] * mine + __shfl_xor_sync(WARP_ALL, seen.mixed[j], offset) * theirs;
        }
    }
}

// The sequence whose tokens [start[s], start[s + 1]) hold `token`.
DEVICE int sequence_of(int token, const int* start, int sequences) {
    int low = 0, high = sequences;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (start[middle] <= token) low = middle; else high = middle;
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
decode(const T* q, C* keys, C* values, const int* block_table, const int* query_start, const int* seq_lens, T* out,
       float2* stats, const int* positions, const long long* slots, const float* cos_sin, const float* q_norm,
       const float* k_norm, int sequences, int num_heads, int num_kv_heads, int num_positions, long long q_token,
       long long q_head, long long out_token, long long out_part, long long out_head, long long table_row,
       long long cos_sin_row, float scale, float eps) {
    __shared__ __align__(16) float mixed[WARPS][HEADS][D];
    __shared__ float tops[WARPS][HEADS], sums[WARPS][HEADS];
    __shared__ __align__(16) Preparation preparation;
    int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    int token = blockIdx.x, first_head = blockIdx.y * HEADS, part = blockIdx.z, parts = gridDim.z;
    int group = num_heads / num_kv_heads, kv_head = first_head / group;

    if (!LATE) launch_next();
    if (FUSED && q_norm) preparation.load_norms(q_norm, k_norm);
    if constexpr (!AHEAD) wait_for_previous();

    int sequence = ONE_EACH ? token : sequence_of(token, query_start, sequences);
    int seen_tokens = seq_lens[sequence], position = 0;
    long long slot = -1;
    if constexpr (FUSED) position = positions[token], slot = slots[token];
    if (!ONE_EACH) {
        int after = query_start[sequence + 1];
        if (token >= after) return;  // padding: it belongs to no sequence
        seen_tokens -= after - 1 - token;
    }
    int share = ceil_div(seen_tokens, parts), begin = part * share, end = min(begin + share, seen_tokens);
    int cached = FUSED ? seen_tokens - 1 : seen_tokens;
    const int* table = block_table + sequence * table_row;
    Batch batch;
    batch.load(keys, values, table, begin + row, end, cached, kv_head, num_kv_heads, lane);
    if constexpr (FUSED) {
        preparation.load_turn(cos_sin + min(max(position, 0), num_positions - 1) * cos_sin_row);
        __syncthreads();
    }
    if (LATE) launch_next();
    if constexpr (AHEAD) wait_for_previous();

    float query[HEADS][2 * PAIRS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) load_row(q + token * q_token + (first_head + h) * q_head, lane, query[h]);
    Row<C> new_key, new_value;
    bool has_newest = FUSED && begin < end && end == seen_tokens;
    if (has_newest) {
        float x[2 * PAIRS];
        load_row(q + token * q_token + (num_heads + num_kv_heads + kv_head) * q_head, lane, x);
        new_value.set(x);
        load_row(q + token * q_token + (num_heads + kv_head) * q_head, lane, x);
        if (k_norm) preparation.normalize(x, false, eps, lane);
        preparation.rotate(x, lane);
        new_key.set(x);
        batch.insert(new_key, new_value, begin + row, cached);
        if (row == 0 && first_head % group == 0 && slot >= 0) {
            new_key.store(keys + slot_row(slot, kv_head, num_kv_heads), lane);
            new_value.store(values + slot_row(slot, kv_head, num_kv_heads), lane);
        }
    }
    Seen seen[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if constexpr (FUSED) {
            if (q_norm) preparation.normalize(query[h], true, eps, lane);
            preparation.rotate(query[h], lane);
        }
        seen[h].top = LOWEST, seen[h].sum = 0.f;
#pragma unroll
        for (int j = 0; j < 2 * PAIRS; j++) query[h][j] *= scale * LOG2_E, seen[h].mixed[j] = 0.f;
    }

    for (int first = begin;;) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) batch.attend(query[h], seen[h], first + row, end);
        first += BATCH * AT_ONCE;
        if (first >= end) break;
        batch.load(keys, values, table, first + row, end, cached, kv_head, num_kv_heads, lane);
        if (has_newest) batch.insert(new_key, new_value, first + row, cached);
    }

#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        merge_rows(seen[h]);
        if (row % ROWS_PER_WARP == 0) {
            store_row(mixed[warp][h], lane, seen[h].mixed);
            if (lane == 0) tops[warp][h] = seen[h].top, sums[warp][h] = seen[h].sum;
        }
    }
    __syncthreads();
    T* to = out + token * out_token + part * out_part;
    for (int i = threadIdx.x; i < HEADS * D; i += WARPS * 32) {
        int h = i / D, element = i % D;
        float top = LOWEST, sum = 0.f, value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w][h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = exp2_approx(tops[w][h] - top);
            sum += sums[w][h] * factor;
            value += mixed[w][h][element] * factor;
        }
        to[(first_head + h) * out_head + element] = from_float<T>(sum > 0.f ? value / sum : 0.f);
        if (element == 0 && stats) stats[((long long)token * parts + part) * num_heads + first_head + h] = make_float2(top, sum);
    }
}
