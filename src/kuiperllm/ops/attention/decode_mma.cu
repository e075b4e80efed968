// Attention of the newest token of each sequence, on tensor cores: a block takes up to 8 query heads of a sequence that
// share a key/value head, and one part of the context. It starts to fetch keys and values while the kernel in front of it
// still works, if its shared memory fits on a multiprocessor beside that of the other.
//
// Each warp has a ring of STAGES steps of 8 * TILES tokens in shared memory, on their way there or used, and shares nothing
// with the others until all are merged. Lanes read 16 bytes at a time from the ring, in the order in which tensor cores want
// them. With g = lane / 4 and t = lane % 4:
//   * a product of queries (16 rows, of which 8 are used) and keys (columns) runs over elements of a head in any order, if it
//     is the same for both: a lane takes pieces of 16 bytes of the key of token g, and has the same pieces of query g;
//   * its result has query g and tokens 2t, 2t + 1 in a lane, and that is how weights are wanted as the second operand of
//     values (rows are elements of a head, columns of the product are queries): a lane takes pieces of the values of tokens
//     2t and 2t + 1, and pairs them up.
// Steps are dealt out in pairs, to the first two warps of all parts, their next two, and so on, and round again. So shares are
// equal, and a warp knows which entries of the block table it needs before it knows how long the context is.
//
//   T, C, D, BLOCK  as in head.cuh (C = T); D is a multiple of 16, BLOCK of 16 and of 8 * TILES or a divisor of it
//   HEADS           query heads of a block, 1 ... 8
//   WARPS, TILES    warps of a block; 8 tokens each of a step
//   STAGES          of a ring
//   FUSED, AHEAD    as in decode.cu; so are `out` and `stats`
//
// The kernel behind this one may start when the last keys and values have been asked for.
// Without FUSED, sequences with another number of new tokens than one are left to other kernels.
#include "head.cuh"
#include "mma.cuh"

constexpr int TOKENS = 8 * TILES;                                          // of a step
constexpr int STRIP = BLOCK % TOKENS == 0 ? TOKENS : 16;                   // of these, neighbours for sure
constexpr int STRIPS = TOKENS / STRIP;
constexpr int PIECES = D / 8, HALF_PIECES = D / 16;                        // of a row and of its half, 16 bytes each
constexpr int HALF_UNITS = (HALF_PIECES + 3) / 4, UNITS = 2 * HALF_UNITS;  // pieces of a key that a lane has
constexpr int VALUE_UNITS = (PIECES + 7) / 8;                              // and of a value
constexpr int SLOTS = VALUE_UNITS * 4 * 32;                                // for what a warp has seen: four numbers each
constexpr int TURN = WARPS % 2 ? 1 : 2;                                     // steps that a part gets at a time
constexpr int TILE = TOKENS * PIECES;                                      // pieces of the keys, or the values, of a step
constexpr int STAGE = 2 * TILE;                                            // of both
constexpr int RING = STAGES * STAGE;
constexpr int WARP_PIECES = RING > SLOTS ? RING : SLOTS;                   // of shared memory that a warp has
static_assert(D % 16 == 0 && BLOCK % STRIP == 0 && TOKENS % STRIP == 0, "whole pieces, whole strips");
static_assert(STRIPS == 1 || 32 % PIECES == 0, "32 pieces of one strip");

// The pieces of a key in lane t: number `unit`, which rotary embedding pairs with the one HALF_UNITS further on.
DEVICE bool has_piece(int unit, int t) { return HALF_PIECES % 4 == 0 || unit % HALF_UNITS * 4 + t < HALF_PIECES; }
DEVICE int piece_of_key(int unit, int t) { return unit / HALF_UNITS * HALF_PIECES + unit % HALF_UNITS * 4 + t; }
// The same for a value, in lane g of its eight.
DEVICE bool has_value_piece(int unit, int g) { return PIECES % 8 == 0 || unit * 8 + g < PIECES; }

DEVICE uint4 load_piece(const T* row, int piece) { return __ldcg((const uint4*)row + piece); }
DEVICE unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Steps, each named by its first token.
struct Steps {
    const T *keys, *values;  // of the key/value head
    const int* table;
    int block_elements;      // from a block of the cache to the next one
    int capacity, cached;    // tokens that the table has room for; tokens that are in the cache
    int lane;

    // Which blocks of the cache hold a step; any, if it is past the end of the table.
    struct Place { int block[STRIPS]; };
    DEVICE Place place(int token) const {
        Place found;
#pragma unroll
        for (int i = 0; i < STRIPS; i++)
            found.block[i] = __ldcg(table + (unsigned)min(token + i * STRIP, capacity - 1) / BLOCK);
        return found;
    }
    DEVICE long long strip(int token, const Place& place, int i) const {
        return (long long)place.block[i] * block_elements + (token + i * STRIP) % BLOCK * D;
    }

    // In shared memory, pieces of a row are exchanged so that lanes that read at the same time use different banks.
    static DEVICE int place_of_key(int row, int piece) { return row * PIECES + (PIECES % 8 == 0 ? piece ^ (row & 1) << 2 : piece); }
    static DEVICE int place_of_value(int row, int piece) { return row * PIECES + (PIECES % 8 == 0 ? piece ^ (row >> 1 & 3) << 1 : piece); }

    // Queue the copies of a step as one group, which is empty past the end. Tokens that are not in the cache become zeros.
    // The newest token of a fused step still has a step; nobody would wait for one behind it.
    DEVICE void copy(uint4* to, int token, const Place& place) const {
        if (token < cached + (FUSED ? 1 : 0)) {
#pragma unroll
            for (int i = 0; i < (TILE + 31) / 32; i++) {
                const int at = i * 32 + lane, row = at / PIECES, piece = at % PIECES;
                if (TILE % 32 && at >= TILE) continue;
                const long long from = strip(token, place, i * 32 / PIECES / STRIP) + row % STRIP * D + piece * 8;
                const bool valid = token + row < cached;
                copy_async_or_zero(to + place_of_key(row, piece), keys + from, valid);
                copy_async_or_zero(to + TILE + place_of_value(row, piece), values + from, valid);
            }
        }
        commit_copies();
    }
    DEVICE void read_keys(uint4 (&key)[TILES][UNITS], const uint4* from) const {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++)
                key[tile][unit] = has_piece(unit, t) ? from[place_of_key(tile * 8 + g, piece_of_key(unit, t))] : make_uint4(0, 0, 0, 0);
        }
    }
    DEVICE void read_values(uint4 (&value)[TILES][2][VALUE_UNITS], const uint4* from) const {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int unit = 0; unit < VALUE_UNITS; unit++)
                    value[tile][i][unit] = has_value_piece(unit, g) ? from[place_of_value(tile * 8 + 2 * t + i, unit * 8 + g)] : make_uint4(0, 0, 0, 0);
            }
        }
    }
};

// A query or a key, normalized (by `norm`, if there is one) and rotated, in the pieces that the four lanes of a row have.
DEVICE void prepare(uint4 (&piece)[UNITS], const float* turn, const float* norm, float eps, int t) {
    float factor = 1.f;
    if (norm) {
        float squares = 0.f;
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            float x[8];
            unpack(piece[unit], x, T());
#pragma unroll
            for (int i = 0; i < 8; i++) squares += x[i] * x[i];
        }
        factor = rsqrtf(warp_reduce<4>(squares, Sum()) * (1.f / D) + eps);
    }
#pragma unroll
    for (int unit = 0; unit < HALF_UNITS; unit++) {
        const int at = (has_piece(unit, t) ? piece_of_key(unit, t) : 0) * 8;
        float x[8], y[8], cosine[8], sine[8];
        unpack(piece[unit], x, T()), unpack(piece[HALF_UNITS + unit], y, T());
        if (norm) {
            float of_x[8], of_y[8];
            ::load(norm + at, of_x), ::load(norm + HALF + at, of_y);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] *= factor * of_x[i], y[i] *= factor * of_y[i];
        }
        ::load(turn + at, cosine), ::load(turn + HALF + at, sine);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float a = x[i], b = y[i];
            x[i] = a * cosine[i] - b * sine[i];
            y[i] = a * sine[i] + b * cosine[i];
        }
        piece[unit] = pack(x, T()), piece[HALF_UNITS + unit] = pack(y, T());
    }
}

// Scores of tokens 2t and 2t + 1 of each tile for query g.
DEVICE void multiply(float (&score)[TILES][2], const uint4 (&query)[UNITS], const uint4 (&key)[TILES][UNITS]) {
    constexpr int CHAINS = TILES < 4 ? 2 : 1;  // sums that do not wait for each other
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float sum[CHAINS][4] = {};
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            const uint4 q = query[unit], k = key[tile][unit];
            const unsigned low[4] = {q.x, 0, q.y, 0}, high[4] = {q.z, 0, q.w, 0};
            mma_16x8x16<T>(sum[0], low, k.x, k.y);
            mma_16x8x16<T>(sum[CHAINS - 1], high, k.z, k.w);
        }
        score[tile][0] = CHAINS == 2 ? sum[0][0] + sum[CHAINS - 1][0] : sum[0][0];
        score[tile][1] = CHAINS == 2 ? sum[0][1] + sum[CHAINS - 1][1] : sum[0][1];
    }
}

// What a lane has seen: for query g the largest score (times log2 e), and the sum of weights over its own tokens; for
// queries 2t and 2t + 1 the mix of values, two neighbouring elements in mixed[unit][i]: 8 * (8 * unit + g) + 2 * i.
struct Seen {
    float top, sum, mixed[VALUE_UNITS][4][4];

    // Turn the scores of the first `count` tokens into weights, those of others into zeros.
    DEVICE void weigh(float (&score)[TILES][2], int count, float scale) {
        const int t = threadIdx.x & 3;
        float highest = LOWEST;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                score[tile][i] = tile * 8 + 2 * t + i < count ? score[tile][i] * scale : LOWEST;
                highest = fmaxf(highest, score[tile][i]);
            }
        }
        highest = fmaxf(top, warp_reduce<4>(highest, Max()));
        const float shrink = exp2_approx(top - highest);
        top = highest;
        sum *= shrink;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                score[tile][i] = exp2_approx(score[tile][i] - highest);
                sum += score[tile][i];
            }
        }
        const float first = __shfl_sync(WARP_ALL, shrink, 8 * t), second = __shfl_sync(WARP_ALL, shrink, 8 * t + 4);
#pragma unroll
        for (int unit = 0; unit < VALUE_UNITS; unit++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                mixed[unit][i][0] *= first, mixed[unit][i][1] *= second, mixed[unit][i][2] *= first, mixed[unit][i][3] *= second;
        }
    }
    DEVICE void mix(const uint4 (&value)[TILES][2][VALUE_UNITS], const float (&weight)[TILES][2]) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 2) {
            constexpr bool HAS_PAIR = TILES % 2 == 0;
            const int pair = HAS_PAIR ? tile + 1 : tile;
            unsigned low = pack2<T>(weight[tile][0], weight[tile][1]), high = HAS_PAIR ? pack2<T>(weight[pair][0], weight[pair][1]) : 0;
#pragma unroll
            for (int unit = 0; unit < VALUE_UNITS; unit++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    unsigned a = word(value[tile][0][unit], i), b = word(value[tile][1][unit], i);
                    unsigned c = word(value[pair][0][unit], i), d = word(value[pair][1][unit], i);
                    const unsigned rows[4] = {__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), HAS_PAIR ? __byte_perm(c, d, 0x5410) : 0, HAS_PAIR ? __byte_perm(c, d, 0x7632) : 0};
                    mma_16x8x16<T>(mixed[unit][i], rows, low, high);
                }
            }
        }
    }
};

// Half of a multiprocessor's registers suffice with common heads (on chips before Blackwell, for which other code is made).
constexpr int LEAST_BLOCKS = WARPS == 8 && TILES * D <= 128 && D % 64 == 0 && __CUDA_ARCH__ < 1000 ? 2 : 1;

extern "C" __global__ void __launch_bounds__(WARPS * 32, LEAST_BLOCKS)
decode_mma(const T* q, T* keys, T* values, const int* block_table, const int* query_start, const int* seq_lens, T* out,
           float2* stats, const int* positions, const long long* slots, const float* cos_sin, const float* q_norm,
           const float* k_norm, int num_heads, int num_kv_heads, int num_positions, int capacity,
           long long q_token, long long q_head, long long out_token, long long out_part, long long out_head,
           long long table_row, long long cos_sin_row, float scale, float eps) {
    __shared__ __align__(16) T newest[2][D];  // the new key and value
    __shared__ __align__(16) Preparation preparation;
    __shared__ float tops[WARPS][8], sums[WARPS][8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int sequence = blockIdx.z, part = blockIdx.x, parts = gridDim.x;
    const int group = num_heads / num_kv_heads, blocks_of_group = ceil_div(group, HEADS);
    const int kv_head = blockIdx.y / blocks_of_group, first_of_group = blockIdx.y % blocks_of_group * HEADS;
    const int first_head = kv_head * group + first_of_group, heads = min(HEADS, group - first_of_group);

    if constexpr (!AHEAD) wait_for_previous();
    int token = sequence;
    if constexpr (!FUSED) {
        token = query_start[sequence];
        if (query_start[sequence + 1] != token + 1) {
            launch_next();
            return;
        }
    }
    // The entries of the table do not depend on the length: they come with it.
    Steps steps = {keys + kv_head * BLOCK * D, values + kv_head * BLOCK * D, block_table + sequence * table_row, num_kv_heads * BLOCK * D, capacity, 0, lane};
    int first = ((warp / TURN * parts + part) * TURN + warp % TURN) * TOKENS;  // of the present step
    const int jump = WARPS * parts * TOKENS;
    Steps::Place places[STAGES + 1];  // of the steps that are copied first, and of the one behind them
#pragma unroll
    for (int i = 0; i <= STAGES; i++) places[i] = steps.place(first + i * jump);
    uint4* const ring = (uint4*)shared_memory + warp * WARP_PIECES;
    int position = 0;
    long long slot = -1;
    if constexpr (FUSED) position = positions[token], slot = slots[token];
    const int seen_tokens = __ldcg(seq_lens + sequence);
    steps.cached = FUSED ? seen_tokens - 1 : seen_tokens;

#pragma unroll
    for (int i = 0; i < STAGES; i++) steps.copy(ring + i * STAGE, first + i * jump, places[i]);
    Steps::Place place = places[STAGES];
    if (first + STAGES * jump >= seen_tokens) launch_next();
    // Whether this warp's last step ends with the new token.
    const bool has_newest = FUSED && steps.cached >= first && (steps.cached - first) % jump < TOKENS;
    if constexpr (FUSED) {
        if (q_norm) preparation.load_norms(q_norm, k_norm);
        preparation.load_turn(cos_sin + min(max(position, 0), num_positions - 1) * cos_sin_row);
        __syncthreads();
    }
    if constexpr (AHEAD) wait_for_previous();

    // The queries; and the new key and value, in the warp that has them in its last step.
    uint4 query[UNITS];
    const T* own = q + token * q_token;
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
        query[unit] = g < heads && has_piece(unit, t) ? load_piece(own + (first_head + g) * q_head, piece_of_key(unit, t)) : make_uint4(0, 0, 0, 0);
    if constexpr (FUSED) {
        if (has_newest) {
            const T *new_key = own + (num_heads + kv_head) * q_head, *new_value = new_key + num_kv_heads * q_head;
            const bool is_kept = first_of_group == 0 && slot >= 0;
            const long long to = is_kept ? slot_row(slot, kv_head, num_kv_heads) : 0;
            uint4 of_key[UNITS];
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) of_key[unit] = has_piece(unit, t) ? load_piece(new_key, piece_of_key(unit, t)) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int unit = 0; unit < VALUE_UNITS; unit++) {
                if (t > 0 || !has_value_piece(unit, g)) continue;
                uint4 v = load_piece(new_value, unit * 8 + g);
                ((uint4*)newest[1])[unit * 8 + g] = v;
                if (is_kept) ((uint4*)(values + to))[unit * 8 + g] = v;
            }
            prepare(of_key, preparation.turn, k_norm ? preparation.k_norm : nullptr, eps, t);
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                if (g > 0 || !has_piece(unit, t)) continue;
                ((uint4*)newest[0])[piece_of_key(unit, t)] = of_key[unit];
                if (is_kept) ((uint4*)(keys + to))[piece_of_key(unit, t)] = of_key[unit];
            }
            __syncwarp();
        }
        prepare(query, preparation.turn, q_norm ? preparation.q_norm : nullptr, eps, t);
    }

    Seen seen = {LOWEST, 0.f, {}};
    uint4* stage = ring;
    while (first < seen_tokens) {
        const int at = steps.cached - first, asked = first + STAGES * jump;
        wait_for_copies<STAGES - 1>();
        __syncwarp();
        uint4 key[TILES][UNITS], value[TILES][2][VALUE_UNITS];
        steps.read_keys(key, stage);
        if (has_newest && at < TOKENS) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                if (tile * 8 + g != at) continue;
#pragma unroll
                for (int unit = 0; unit < UNITS; unit++) {
                    if (has_piece(unit, t)) key[tile][unit] = ((const uint4*)newest[0])[piece_of_key(unit, t)];
                }
            }
        }
        float weight[TILES][2];
        multiply(weight, query, key);
        steps.read_values(value, stage + TILE);
        if (has_newest && at < TOKENS) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (tile * 8 + 2 * t + i != at) continue;
#pragma unroll
                    for (int unit = 0; unit < VALUE_UNITS; unit++) {
                        if (has_value_piece(unit, g)) value[tile][i][unit] = ((const uint4*)newest[1])[unit * 8 + g];
                    }
                }
            }
        }
        __syncwarp();
        steps.copy(stage, asked, place);
        place = steps.place(asked + jump);
        stage = stage + STAGE == ring + RING ? ring : stage + STAGE;
        if (asked < seen_tokens && asked + jump >= seen_tokens) launch_next();
        seen.weigh(weight, seen_tokens - first, scale * LOG2_E);
        seen.mix(value, weight);
        first += jump;
    }

    // Together: each warp leaves what it has seen in shared memory.
    float4* all = (float4*)shared_memory;
    seen.sum = warp_reduce<4>(seen.sum, Sum());
    if (t == 0) tops[warp][g] = seen.top, sums[warp][g] = seen.sum;
    if (2 * t < HEADS) {
#pragma unroll
        for (int unit = 0; unit < VALUE_UNITS; unit++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&m)[4] = seen.mixed[unit][i];
                all[warp * WARP_PIECES + (unit * 4 + i) * 32 + lane] = make_float4(m[0], m[1], m[2], m[3]);
            }
        }
    }
    __syncthreads();
    T* to = out + token * out_token + part * out_part + first_head * out_head;
#pragma unroll
    for (int start = 0; start < SLOTS; start += WARPS * 32) {
        const int slot = start + threadIdx.x, unit = slot / 128, i = slot / 32 % 4, piece = unit * 8 + g;
        if (2 * t >= heads || slot >= SLOTS || piece >= PIECES) continue;
        float top[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f}, mixed[2][2] = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++) top[0] = fmaxf(top[0], tops[w][2 * t]), top[1] = fmaxf(top[1], tops[w][2 * t + 1]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float4 m = all[w * WARP_PIECES + slot];
            const float first = exp2_approx(tops[w][2 * t] - top[0]), second = exp2_approx(tops[w][2 * t + 1] - top[1]);
            sum[0] += first * sums[w][2 * t], sum[1] += second * sums[w][2 * t + 1];
            mixed[0][0] += first * m.x, mixed[1][0] += second * m.y, mixed[0][1] += first * m.z, mixed[1][1] += second * m.w;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (2 * t + h >= heads) continue;
            const float inverse = sum[h] > 0.f ? __fdividef(1.f, sum[h]) : 0.f;
            *(unsigned*)(to + (2 * t + h) * out_head + piece * 8 + 2 * i) = pack2<T>(mixed[h][0] * inverse, mixed[h][1] * inverse);
            if (piece == 0 && i == 0 && stats)
                stats[((long long)token * parts + part) * num_heads + first_head + 2 * t + h] = make_float2(top[h], sum[h]);
        }
    }
}
