// Attention of the newest token of each sequence, on tensor cores: a block takes up to 16 query heads of a sequence that
// share a key/value head, and one part of the context. Each warp goes through every WARPS-th strip of 16 tokens by itself,
// with STAGES of them in its own shared memory or on their way there; what the warps have seen is merged at the end. This
// reads each key and value once and keeps enough bytes under way to be bound by memory alone.
//
//   T, C, D, BLOCK  as in head.cuh and tiles.cuh (C = T); BLOCK is a multiple of 16: no strip crosses blocks of the cache
//   HEADS           query heads of a block, 1 ... 16
//   FUSED, AHEAD    as in decode.cu; so are `out` and `stats`
//
// Without FUSED, sequences with another number of new tokens than one are left to other kernels.
#include "head.cuh"
#include "tiles.cuh"

constexpr int STRIP = 16 * ROW;  // elements of a strip of keys in shared memory; the values follow
static_assert(STAGES * 2 * STRIP * sizeof(T) >= 16 * COLUMNS * sizeof(float), "room to merge in");

// The strips of one warp.
struct Strips {
    const T *keys, *values;
    const int* table;
    T* shared;
    int begin, end, kv_head, num_kv_heads, blocks;

    DEVICE int first_token(int strip) const { return begin + strip * WARPS * 16; }
    DEVICE T* stage(int strip) const { return shared + strip % STAGES * 2 * STRIP; }

    // Queue the copies of a strip as one group, which is empty past the end.
    DEVICE void load(int strip) {
        int lane = threadIdx.x & 31, token = first_token(strip);
        if (strip % 32 == 0) {  // the table's entries for 32 strips, one in each lane
            int mine = first_token(strip + lane);
            blocks = mine < end ? __ldg(table + mine / BLOCK) : 0;
        }
        int block = __shfl_sync(WARP_ALL, blocks, strip % 32);
        if (token < end) {
            long long row = cached_row(block, token % BLOCK, kv_head, num_kv_heads);
            T* to = stage(strip);
#pragma unroll
            for (int i = 0; i < UNITS / 2; i++) {
                int r = (i * 32 + lane) / UNITS, unit = (i * 32 + lane) % UNITS;
                copy_unit(to, r, unit, keys + row + r * D, token + r < end);
                copy_unit(to + STRIP, r, unit, values + row + r * D, token + r < end);
            }
        }
        commit_copies();
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
decode_mma(const T* q, T* keys, T* values, const int* block_table, const int* query_start, const int* seq_lens, T* out,
           float2* stats, const int* positions, const long long* slots, const float* cos_sin, const float* q_norm,
           const float* k_norm, int num_heads, int num_kv_heads, int num_positions, long long q_token, long long q_head,
           long long out_token, long long out_part, long long out_head, long long table_row, long long cos_sin_row,
           float scale, float eps) {
    __shared__ __align__(16) T queries[16 * ROW];
    __shared__ __align__(16) T newest[2][COLUMNS];              // the new key and value
    __shared__ __align__(16) Preparation preparation;
    __shared__ float tops[WARPS + 1][16], sums[WARPS + 1][16];  // of each warp; and of the new token
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, row = threadIdx.x / LANES, row_lane = threadIdx.x % LANES;
    int sequence = blockIdx.x, part = blockIdx.z, parts = gridDim.z;
    int group = num_heads / num_kv_heads, blocks_of_group = ceil_div(group, HEADS);
    int kv_head = blockIdx.y / blocks_of_group, first_of_group = blockIdx.y % blocks_of_group * HEADS;
    int first_head = kv_head * group + first_of_group, heads = min(HEADS, group - first_of_group);

    launch_next();
    if (FUSED && q_norm) preparation.load_norms(q_norm, k_norm);
    if constexpr (!AHEAD) wait_for_previous();

    int token = sequence;
    if constexpr (!FUSED) {
        token = query_start[sequence];
        if (query_start[sequence + 1] != token + 1) return;
    }
    int seen_tokens = seq_lens[sequence], cached = FUSED ? seen_tokens - 1 : seen_tokens;
    int share = ceil_div(ceil_div(seen_tokens, 16), parts) * 16, begin = part * share, end = min(begin + share, cached);
    bool has_newest = FUSED && begin < seen_tokens && seen_tokens <= begin + share;
    Strips strips{keys, values, block_table + sequence * table_row, (T*)shared_memory + warp * STAGES * 2 * STRIP,
                  begin + warp * 16, end, kv_head, num_kv_heads, 0};
#pragma unroll
    for (int strip = 0; strip < STAGES - 1; strip++) strips.load(strip);
    // Rows of queries past `heads` and columns past D are zeros.
    for (int i = threadIdx.x; i < 16 * ROW; i += WARPS * 32) {
        if (i / ROW >= heads || i % ROW >= D) queries[i] = from_float<T>(0.f);
    }
    long long slot = -1;
    if constexpr (FUSED) {
        int position = min(max(positions[token], 0), num_positions - 1);
        preparation.load_turn(cos_sin + position * cos_sin_row);
        slot = slots[token];
        __syncthreads();
    }
    if constexpr (AHEAD) wait_for_previous();

    // Queries, the new key and the new value to shared memory, one after the other.
    const T* own = q + token * q_token;
    int rows = heads + (has_newest ? 2 : 0);
    for (int first = 0; first < rows; first += WARPS * ROWS_PER_WARP) {
        int r = first + row, head = r < heads ? first_head + r : num_heads + (r - heads) * num_kv_heads + kv_head;
        Row<T> raw;
        raw.clear();
        if (r < rows) raw.load(own + head * q_head, row_lane);
        if constexpr (FUSED) {
            float x[2 * PAIRS];
            raw.get(x);
            if (q_norm) preparation.normalize(x, r < heads, eps, row_lane);
            preparation.rotate(x, row_lane);
            if (r <= heads) raw.set(x);
        }
        if (r < heads) raw.store(queries + r * ROW, row_lane);
        else if (r < rows) {
            raw.store(newest[r - heads], row_lane);
            if (first_of_group == 0 && slot >= 0)
                raw.store((r == heads ? keys : values) + slot_row(slot, kv_head, num_kv_heads), row_lane);
        }
    }
    __syncthreads();
    unsigned q_fragments[STEPS_D][4];
#pragma unroll
    for (int step = 0; step < STEPS_D; step++) load_matrices(q_fragments[step], queries + (lane & 15) * ROW + step * 16 + (lane >> 4) * 8);
    for (int h = warp; h < HEADS; h += WARPS) {
        float score = 0.f;
        if (has_newest)
            for (int i = lane; i < D; i += 32) score += to_float(queries[h * ROW + i]) * to_float(newest[0][i]);
        score = warp_sum(score);
        if (lane == 0) tops[WARPS][h] = has_newest ? score * scale * LOG2_E : LOWEST, sums[WARPS][h] = has_newest ? 1.f : 0.f;
    }

    Softmax softmax;
    float mixed[COLUMNS / 8][4];
    clear(mixed);
    for (int strip = 0; strips.first_token(strip) < end; strip++) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();
        strips.load(strip + STAGES - 1);
        const T* tile = strips.stage(strip);
        float scores[2][4];
        clear(scores);
        multiply_keys<16>(scores, q_fragments, tile);
        int token_of_lane = strips.first_token(strip) + 2 * (lane & 3);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (token_of_lane + (i & 1) + (i >> 2) * 8 >= end) scores[i >> 2][i & 3] = LOWEST;
        }
        softmax.weigh<16, HEADS <= 8 ? 1 : 2>(scores, mixed, scale * LOG2_E);
        multiply_values<16>(mixed, scores, tile + STRIP);
    }
    softmax.finish();
    wait_for_copies<0>();
    __syncthreads();

    // Merge: the strips' memory now holds [WARPS][HEADS][COLUMNS].
    float* all = (float*)shared_memory;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int h = lane / 4 + 8 * r;
        if (h < HEADS) {
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; i++)
                *(float2*)(all + (warp * HEADS + h) * COLUMNS + i * 8 + 2 * (lane & 3)) = make_float2(mixed[i][2 * r], mixed[i][2 * r + 1]);
            if ((lane & 3) == 0) tops[warp][h] = softmax.top[r], sums[warp][h] = softmax.sum[r];
        }
    }
    __syncthreads();
    T* to = out + token * out_token + part * out_part + first_head * out_head;
    for (int i = threadIdx.x; i < heads * D; i += WARPS * 32) {
        int h = i / D, element = i % D;
        float top = tops[WARPS][h];
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w][h]);
        float factor = exp2_approx(tops[WARPS][h] - top), sum = sums[WARPS][h] * factor;
        float value = has_newest ? to_float(newest[1][element]) * factor : 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            factor = exp2_approx(tops[w][h] - top);
            sum += sums[w][h] * factor;
            value += all[(w * HEADS + h) * COLUMNS + element] * factor;
        }
        to[h * out_head + element] = from_float<T>(sum > 0.f ? value / sum : 0.f);
        if (element == 0 && stats) stats[((long long)token * parts + part) * num_heads + first_head + h] = make_float2(top, sum);
    }
}
