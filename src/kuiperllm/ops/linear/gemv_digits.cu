// Matrix times vector for one row of x and codes of 4 or 8 bits, on integer tensor cores, at the speed at which the codes can
// be read.
//
// x becomes whole numbers below 2^21: each warp brings its own chunk of the columns to shared memory, times the power of two
// that makes its largest number about 2^20, rounded, as three digits of 8 bits with a sign. A product of tensor cores takes 16
// rows of W with 32 columns, and the digits as three of its eight vectors. Its sums are exact. They start at 1.5 * 2^23 in the
// bits of a float, so that they are floats without a conversion; a group's sums are multiplied with its scale, and digits meet
// at the end of a tile.
//
// 8-bit codes are operands as they are. Of 4-bit codes, the four bits become the upper ones of a byte with a sign: 16 times the
// code less its middle. A word of them makes two operands, columns 0, 4, 1, 5 and 2, 6, 3, 7 of its eight (codes.cuh), so x is
// kept in that order.
//
// Warps share rows and fetch them through rings of their own as in gemv_codes.cu. A stage has, for each of 16 rows, UNITS spans
// of 32 bytes and 16 bytes for the scales: with these, eight rows of a span are in different banks.
//
// Parameters beside those of gemv.cuh: BITS, GROUP of the scheme; UNITS of a stage of the ring, STAGES of the ring; MIN_BLOCKS
// that must fit a multiprocessor's registers.
#include "mma.cuh"
#include "gemv.cuh"

constexpr int SPAN_K = 32 * 8 / BITS, STEP_K = UNITS * SPAN_K, STEPS = K / STEP_K;
constexpr int SPANS_BYTES = UNITS * 32, PITCH = SPANS_BYTES + 16, STAGE_BYTES = 16 * PITCH;  // of a row; in a stage
constexpr int TILE = GATED ? 8 : 16;                                         // outputs of a tile of 16 rows of W
constexpr int STEP_GROUPS = STEP_K / GROUP, PRODUCTS = GROUP / 32;           // of a stage; of a group
constexpr int RECORD = STEP_GROUPS * 2;
constexpr long long ROW_BYTES = (long long)K * BITS / 8, SCALES_ROW = K / GROUP * 2;
constexpr bool IS_EVEN = STEPS % CHUNKS == 0;
constexpr int MAX_STEPS = (STEPS + CHUNKS - 1) / CHUNKS, PASSES = (MAX_STEPS * STEP_K / 8 + 31) / 32;
constexpr bool IS_FULL = IS_EVEN && MAX_STEPS * STEP_K % 256 == 0;           // every lane has a vector of x in every pass
static_assert(K % STEP_K == 0 && STEP_K % GROUP == 0 && GROUP % 32 == 0 && RECORD <= 16, "stages and groups are whole");
static_assert(sizeof(T) == 2, "activations have 16 bits");

constexpr float ZERO = 12582912.f;  // 1.5 * 2^23
constexpr unsigned ZERO_BITS = 0x4b400000u;

// --- the matrix -------------------------------------------------------------------------------------------------------

template <int bytes> DEVICE void copy_record(SharedAddress to, const char* from) {
    if constexpr (bytes == 16) copy_async(to, from);
    else if constexpr (bytes == 8) copy_async_eight(to, from, 8);
    else copy_async_word(to, from, 4);
}

// Copies tiles of the matrix to the ring. A warp walks along the columns (`steps` stages) of one tile, then of the next of its
// tiles. Rows that are not the block's are left out: what the ring holds in their place becomes sums of no use.
struct Fetcher {
    static constexpr int LANES = SPANS_BYTES / 16, ROWS = 32 / LANES;  // lanes that share a row; rows that all copy together
    int steps, left;               // of a tile; of this tile, to be fetched
    int to, record_to;             // where in a stage this lane's pieces are
    int limit, record_limit;       // rows of a pass before these are the block's
    long long second;              // from the first row to the eighth behind it
    const char *codes, *scales;    // where this lane goes on

    DEVICE Fetcher(int lane, const char* codes_, const char* scales_, int outputs, int first, int count, int begin, int steps_)
        : steps(steps_), left(steps_), second(GATED ? outputs : 8) {
        const int row = lane / LANES, record = lane % 16;
        to = in_register(row * PITCH + lane % LANES * 16), record_to = in_register(record * PITCH + SPANS_BYTES);
        limit = in_register(count - row), record_limit = in_register(lane < 16 ? count - (GATED ? record % 8 : record) : 0);
        codes = codes_ + (first + row) * ROW_BYTES + begin * SPANS_BYTES + lane % LANES * 16;
        scales = scales_ + (first + record % 8 + record / 8 * second) * SCALES_ROW + begin * RECORD;
    }
    DEVICE void fetch(SharedAddress stage) {
        const char* half[2] = {codes, GATED ? codes + second * ROW_BYTES : codes + 8 * ROW_BYTES};
#pragma unroll
        for (int row = 0; row < 16; row += ROWS)
            if ((GATED ? row % 8 : row) < limit) copy_async(stage + (to + row * PITCH), half[row / 8] + row % 8 * ROW_BYTES);
        if (record_limit > 0) copy_record<RECORD>(stage + record_to, scales);
        codes += SPANS_BYTES, scales += RECORD;
        if (--left == 0) {
            codes += GROUPS * TILE * ROW_BYTES - steps * SPANS_BYTES, scales += GROUPS * TILE * SCALES_ROW - steps * RECORD;
            limit -= GROUPS * TILE, record_limit -= GROUPS * TILE, left = steps;
        }
    }
};

// --- x ------------------------------------------------------------------------------------------------------------------

// Byte `digit` of four words, side by side.
template <int digit> DEVICE unsigned gather_bytes(const unsigned* word) {
    constexpr unsigned PAIR = digit | (digit + 4) << 4;
    return __byte_perm(__byte_perm(word[0], word[1], PAIR), __byte_perm(word[2], word[3], PAIR), 0x5410);
}

// A warp's digits of x: vectors of 16 bytes [64 columns][digit][t], with t = lane % 4: what lane t needs for two products.
struct Operand {
    static constexpr int WORDS = MAX_STEPS * STEP_K / 64 * 48, BYTES = WORDS * 4;
    unsigned* words;

    template <int digit> DEVICE void keep_digit(int vector, const unsigned (&number)[8]) const {
        unsigned* to = words + vector / 8 * 48 + digit * 16;
        // The digits are bytes less 128, the highest less 64.
        constexpr unsigned MORE = digit == 2 ? 0x40404040u : 0u;
        if constexpr (BITS == 8) {
            to += (2 * vector & 2) * 4 + (vector >> 1 & 3);
            to[0] = (gather_bytes<digit>(number) + MORE) ^ 0x80808080u;
            to[4] = (gather_bytes<digit>(number + 4) + MORE) ^ 0x80808080u;
        } else {
            const unsigned first[4] = {number[0], number[4], number[1], number[5]}, second[4] = {number[2], number[6], number[3], number[7]};
            *(uint2*)(to + vector % 4 * 4 + (vector & 4) / 2) = make_uint2((gather_bytes<digit>(first) + MORE) ^ 0x80808080u, (gather_bytes<digit>(second) + MORE) ^ 0x80808080u);
        }
    }

    // `count` vectors of x, 8 numbers each, of which the lane has every 32nd. Returns what sums are to be multiplied with.
    DEVICE float keep(const float (&value)[PASSES][8], int lane, int count) const {
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < PASSES * 8; i++) largest = max_or_nan(largest, fabsf(value[i / 8][i % 8]));
        const unsigned exponent = max(warp_max_bits(__float_as_uint(largest)) >> 23, 32u);
        const float factor = __uint_as_float((274 - exponent) << 23);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int vector = pass * 32 + lane;
            if (!IS_FULL && vector >= count) continue;
            unsigned number[8];
#pragma unroll
            for (int e = 0; e < 8; e++) number[e] = __float_as_uint(fmaf(value[pass][e], factor, ZERO + 0x8080));
            keep_digit<0>(vector, number), keep_digit<1>(vector, number), keep_digit<2>(vector, number);
        }
        constexpr unsigned bits_of_code = BITS == 4 ? 4 : 0;
        // What is not finite stays visible.
        return exponent == 255 ? __uint_as_float(0x7fffffffu) : __uint_as_float((exponent - 20 - bits_of_code) << 23);
    }
};

// A lane's part of its warp's chunk of x: what is needed from memory that is constant comes first, then the rest.
struct LaneRow {
    float norm[PROLOGUE == NORM ? PASSES : 1][8], value[PASSES][8];

    static DEVICE int vector(int pass, int first, int lane) { return min(first + pass * 32 + lane, K / 8 - 1); }

    DEVICE void load_norm(const float* weight, int first, int lane) {
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const float4* from = (const float4*)(weight + vector(pass, first, lane) * 8);
            const float4 a = __ldcg(from), b = __ldcg(from + 1);
            const float all[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int e = 0; e < 8; e++) norm[pass][e] = all[e];
        }
    }
    // Vectors [first, first + count). Returns the sum of the squares of a norm's.
    DEVICE float load(const T* x, const float2* stats, int first, int count, int lane) {
        uint4 raw[PASSES];
        float square = 0.f;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
            if (PROLOGUE != MERGE) raw[pass] = load_fresh(x + vector(pass, first, lane) * 8);
        if constexpr (PROLOGUE == MERGE) merge_splits(x, stats, [&](int pass) { return vector(pass, first, lane); }, value);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const bool is_there = IS_FULL || pass * 32 + lane < count;
            if constexpr (PROLOGUE != MERGE) unpack(raw[pass], value[pass], T());
            if (PROLOGUE == NORM && is_there) square += sum_of_squares(value[pass]);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if (PROLOGUE == NORM) value[pass][e] *= norm[pass][e];
                if (!is_there) value[pass][e] = 0.f;
            }
        }
        return square;
    }
};

// --- the product --------------------------------------------------------------------------------------------------------------

DEVICE void load_scales(const char* from, float (&value)[STEP_GROUPS]) {
    const Pack<unsigned, RECORD / 4> pack = *(const Pack<unsigned, RECORD / 4>*)from;
#pragma unroll
    for (int i = 0; i < STEP_GROUPS; i++) value[i] = to_float(f16{(unsigned short)(pack.item[i / 2] >> i % 2 * 16)});
}

struct Multiplier {
    int g, t;
    int row, record;         // where this lane's row of the matrices to be loaded, and its first scales are in a stage
    const uint4* digits;     // the lane's, of a vector of the product
    uint4 held[STEP_K / 64]; // all of them, if they are those of one stage
    float sum[4];            // of digits 2 t, 2 t + 1 of row g, and of row g + 8

    DEVICE Multiplier(const Operand& operand, int lane) : g(lane / 4), t(lane % 4), row(in_register(lane % 16 * PITCH + lane / 16 * 16)), record(in_register(g * PITCH + SPANS_BYTES)) {
        digits = (const uint4*)operand.words + min(g, 2) * 4 + t;
#pragma unroll
        for (int i = 0; i < STEP_K / 64 && MAX_STEPS == 1; i++) held[i] = digits[i * 12];
        clear();
    }
    DEVICE void clear() { sum[0] = sum[1] = sum[2] = sum[3] = 0.f; }

    // A stage: `step` steps from the start of the chunk.
    DEVICE void multiply(const char* stage, SharedAddress address, int step) {
        float scale[2][STEP_GROUPS];
        load_scales(stage + record, scale[0]);
        load_scales(stage + record + 8 * PITCH, scale[1]);
        const uint4* x = digits + step * (STEP_K / 64 * 12);
        unsigned words[4];
        uint4 b;
        int product[4];
#pragma unroll
        for (int p = 0; p < STEP_K / 32; p++) {
            if (BITS == 8 || p % 2 == 0) load_matrices(words, address + (row + p * 32 * BITS / 8));
            if (p % 2 == 0) b = MAX_STEPS == 1 ? held[p / 2] : x[p / 2 * 12];
            unsigned a[4];
            if constexpr (BITS == 8) {
#pragma unroll
                for (int i = 0; i < 4; i++) a[i] = words[i];
            } else {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const unsigned word = words[p % 2 * 2 + i];
                    a[i] = and_xor(word << 4, 0xf0f0f0f0u, 0x80808080u), a[2 + i] = and_xor(word, 0xf0f0f0f0u, 0x80808080u);
                }
            }
            if (p % PRODUCTS == 0) product[0] = product[1] = product[2] = product[3] = (int)ZERO_BITS;
            mma_16x8x32(product, a, p % 2 ? b.z : b.x, p % 2 ? b.w : b.y);
            if (p % PRODUCTS == PRODUCTS - 1)
#pragma unroll
                for (int i = 0; i < 4; i++) sum[i] += scale[i / 2][p / PRODUCTS] * (__int_as_float(product[i]) - ZERO);
        }
    }

    // A tile's sums of this warp's columns. factor: what sums are to be multiplied with.
    DEVICE void write(const PartialSums& sums, int chunk, int tile, float factor) {
        const float even = t == 0 ? factor : factor * 65536.f, odd = t == 0 ? factor * 256.f : 0.f;
        float low = sum[0] * even + sum[1] * odd, high = sum[2] * even + sum[3] * odd;
        low += __shfl_xor_sync(WARP_ALL, low, 1), high += __shfl_xor_sync(WARP_ALL, high, 1);
        const int output = tile * TILE + g;
        if (t == 0) {
            sums.at(0, chunk, 0)[output] = low;
            (GATED ? sums.at(1, chunk, 0)[output] : sums.at(0, chunk, 0)[output + 8]) = high;
        }
        clear();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gemv_digits(
    const T* x, const float2* stats, const float* norm_weight, float eps,
    const char* codes, const char* scales, const float* bias,
    OUT* out, int outputs, int share, int extra, int launch_after) {
    __shared__ float squares[WARPS];
    const Share mine = share_of_block(share, extra);
    const int lane = in_register(threadIdx.x % 32), warp = in_register(threadIdx.x / 32), group = warp / CHUNKS, chunk = warp % CHUNKS;
    const int ring = warp * (STAGES * STAGE_BYTES);
    const SharedAddress address = shared_address(shared_memory);
    char* of_warps = shared_memory + WARPS * STAGES * STAGE_BYTES;
    const Operand operand = {(unsigned*)(of_warps + warp * Operand::BYTES)};
    // The pitch spreads the sums of a tile over all banks.
    const PartialSums sums = {(float*)(of_warps + WARPS * Operand::BYTES), (share + 16) / 16 * 16 + 4, 1};

    const int tiles = (mine.count + TILE - 1) / TILE;
    const int begin = STEPS * chunk / CHUNKS, steps = IS_EVEN ? MAX_STEPS : STEPS * (chunk + 1) / CHUNKS - begin;
    const int own_tiles = tiles > group ? (tiles - group + GROUPS - 1) / GROUPS : 0;
    Fetcher fetcher(lane, codes, scales, outputs, mine.first + group * TILE, mine.count - group * TILE, begin, steps);
#pragma unroll 1
    for (int stage = 0; stage < STAGES; stage++) {
        keep_pace(stage, own_tiles * steps);
        fetcher.fetch(address + (ring + stage * STAGE_BYTES));
        commit_copies();
    }
    int left = launch_after > own_tiles * steps ? 0 : launch_after;  // stages, until the next kernel may start
    if (left == 0) launch_next();

    Outputs results(out, 0, outputs, 1, mine, bias);
    const int first = begin * (STEP_K / 8), vectors = steps * (STEP_K / 8);
    LaneRow row;
    if constexpr (PROLOGUE == NORM) row.load_norm(norm_weight, first, lane);
    wait_for_previous();
    results.load_addend();
    float square = row.load(x, stats, first, vectors, lane);
    if (PROLOGUE == NORM) square = warp_sum(square);
    const float factor = operand.keep(row.value, lane, vectors);
    if (PROLOGUE == NORM && lane == 0) squares[warp] = group == 0 ? square : 0.f;  // other groups have the same columns
    __syncwarp();

    Multiplier multiplier(operand, lane);
    int stage = ring;
    for (int tile = group; tile < tiles; tile += GROUPS) {
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            wait_for_copies<STAGES - 1>();
            __syncwarp();  // what is multiplied, other lanes have copied
            multiplier.multiply(shared_memory + stage, address + stage, step);
            __syncwarp();
            fetcher.fetch(address + stage);
            commit_copies();
            stage = stage == ring + (STAGES - 1) * STAGE_BYTES ? ring : stage + STAGE_BYTES;
            if (--left == 0) launch_next();
        }
        multiplier.write(sums, chunk, tile, factor);
    }
    __syncthreads();
    results.write(sums, [&](int) { return PROLOGUE == NORM ? norm_scale(squares, eps) : 1.f; });
}
