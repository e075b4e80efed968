// Matrix times 1 to 8 vectors for quantized weights, on tensor cores, at the speed at which the codes can be read.
//
// Like gemv_mma.cu: a product of tensor cores takes 16 rows of W, here as raw float16 made of codes (codes.cuh), and the
// columns come in the order in which lanes bring 16 bytes of a row: with g = lane / 4 and t = lane % 4, a lane brings piece t
// of a unit of rows g and g + 8 of a tile (of a gate's row g and the row g that it gates), and needs the same columns of x.
// Every lane reads back from its ring just the codes that it copied.
//
// Scales stay out of the products. A unit has SPANS groups, each in the columns of some of the four lanes of a row. The 8
// vectors that a product takes at once are therefore rows of x times SPANS: vector number row * SPANS + span holds the row
// where the columns belong to that span, and zeros elsewhere, which only the lanes know that hold them. So each group has a
// sum of its own, which takes one multiplication by its scale. What raw numbers are more than codes, and the middle of codes, is subtracted by starting the
// sums below zero.
//
// x lies in shared memory in float16. Each warp brings its own chunk of the columns there, times a power of two that makes the
// largest number about 2^14, so nothing of it is lost; in front of the product no warp waits for another.
//
// Parameters beside those of gemv.cuh: BITS, CODING, SCALE, GROUP of the scheme; UNITS of a stage of the ring, STAGES of the
// ring; SETS of 8 / SPANS rows of x; MIN_BLOCKS that must fit a multiprocessor's registers.
#include "mma.cuh"
#include "gemv.cuh"
#include "codes.cuh"

constexpr int LOW = low_bits(BITS), HIGH = high_bits(BITS);   // bits of the planes
constexpr int LANE_K = BITS == 8 ? 16 : 32, UNIT_K = 4 * LANE_K, WORDS = LANE_K * BITS / 32;
constexpr int STEP_K = UNITS * UNIT_K, STEPS = (K + STEP_K - 1) / STEP_K;
constexpr bool IS_EVEN = K % STEP_K == 0;
constexpr int PARTS = GROUP < LANE_K ? LANE_K / GROUP : 1;                   // groups in the columns of a lane
constexpr int SPANS = GROUP < LANE_K ? 4 : GROUP < UNIT_K ? UNIT_K / GROUP : 1;
constexpr int SET_ROWS = 8 / SPANS, SLOTS = SETS * SET_ROWS;
constexpr int ROWS_OF_LANE = SPANS == 1 ? 2 : 1;                             // of x, whose sums a lane holds, in each set
constexpr int TILE = GATED ? 8 : 16;                                         // outputs of a tile of 16 rows of W
constexpr bool PAIRED = has_zeros(CODING), IN_SUPER_BLOCKS = sizeof(SCALE) == 1;
static_assert(LANE_K % GROUP == 0 || GROUP % LANE_K == 0, "groups are parts of a lane's columns, or made of such");
static_assert(UNIT_K % GROUP == 0 || GROUP % UNIT_K == 0, "groups are parts of a unit, or made of units");
static_assert(STEP_K % GROUP == 0 || GROUP % STEP_K == 0, "groups are parts of a stage, or made of stages");

__device__ constexpr int lowest_bit(int x) { return x & -x; }
__device__ constexpr int or_one(int x) { return x ? x : 1; }

// --- pieces of the matrix ---------------------------------------------------------------------------------------------

constexpr int LOW_BYTES = LANE_K * LOW / 8, HIGH_BYTES = LANE_K * HIGH / 8;  // that a lane copies of a unit of a row
constexpr long long LOW_ROW = (long long)K * LOW / 8, HIGH_ROW = (long long)K * HIGH / 8;
constexpr int ROW_SLOT = 32 * (LOW_BYTES + HIGH_BYTES), CODE_BYTES = UNITS * 2 * ROW_SLOT;

// The records of a stage: of each of 16 rows the vectors of 16 bytes that hold them. EACH: bytes of a record, COLUMNS that
// it is for.
template <int EACH, int COLUMNS> struct Records {
    static constexpr int ROW = K / COLUMNS * EACH;                                             // bytes of a row
    static constexpr int STEP = (STEP_K > COLUMNS ? STEP_K / COLUMNS : 1) * EACH;              // of a stage
    static constexpr int ALIGNMENT = lowest_bit(ROW | STEP | 16);                              // of where a stage begins
    static constexpr int VECTORS = (16 - ALIGNMENT + STEP + 15) / 16, ALL = 16 * VECTORS, BYTES = ALL * 16;
    static constexpr int PASSES = (ALL + 31) / 32;

    static DEVICE int in_row(int step) { return step * STEP_K / COLUMNS * EACH; }
    // Where the first record of a row is in its vectors.
    static DEVICE int offset(int row, int step) { return ALIGNMENT == 16 ? 0 : (row * ROW + in_row(step)) & 15; }

    const char *row[PASSES], *end;  // rows of the next tile that this lane brings vectors of; the end of all records

    DEVICE void start(const char* records, int lane, int first, int outputs) {
        end = records + (GATED ? 2ll : 1ll) * outputs * ROW;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int r = (pass * 32 + lane) / VECTORS;
            row[pass] = records + (long long)(first + (GATED && r >= 8 ? outputs + r - 8 : r)) * ROW;
        }
    }
    DEVICE void next_tile() {
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) row[pass] += GROUPS * TILE * (long long)ROW;
    }
    // count: of the tile's outputs.
    DEVICE void fetch(char* slot, int lane, int count, int step) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int i = pass * 32 + lane, r = i / VECTORS, v = i % VECTORS;
            if (ALL % 32 && i >= ALL) continue;
            const char* from = row[pass] + in_row(step);
            if (ALIGNMENT < 16) from = (const char*)((unsigned long long)from & ~15ull);
            const bool valid = (GATED ? r % 8 : r) < count && (VECTORS == 1 || from + v * 16 < end);
            copy_async_or_zero(slot + i * 16, from + v * 16, valid);
        }
    }
};
constexpr int RECORD = (PAIRED ? 2 : 1) * (int)sizeof(SCALE);
using GroupRecords = Records<RECORD, GROUP>;
using SuperRecords = Records<PAIRED ? 4 : 2, 256>;
constexpr int STAGE_BYTES = CODE_BYTES + GroupRecords::BYTES + (IN_SUPER_BLOCKS ? SuperRecords::BYTES : 0);

template <int bytes> DEVICE void copy_piece(char* slot, const char* from, bool valid) {
    if constexpr (bytes == 16) copy_async_or_zero(slot, from, valid);
    else if constexpr (bytes == 8) copy_async_eight(slot, from, valid ? 8 : 0);
    else if constexpr (bytes == 4) copy_async_word(slot, from, valid ? 4 : 0);
}
template <int bytes> DEVICE void load_piece(unsigned* words, const char* from) {
    const Pack<unsigned, bytes / 4> pack = *(const Pack<unsigned, bytes / 4>*)from;
#pragma unroll
    for (int i = 0; i < bytes / 4; i++) words[i] = pack.item[i];
}

// Copies tiles of the matrix to the ring. A warp walks along the columns (its steps [begin, end)) of one tile, then of the
// next of its tiles.
struct Fetcher {
    int lane, begin, end, left, step;                // left: steps to be fetched
    int count;                                       // outputs from the tile on
    long long second;                                // rows from one of this lane's two rows to the other
    const char *low, *high;                          // where this lane goes on in the planes of the first
    GroupRecords groups;
    SuperRecords blocks;

    DEVICE Fetcher(int lane_, const char* codes, const char* more_codes, const char* scales, const char* super_scales, int outputs, Share share, int tile, int begin_, int end_, int left_)
        : lane(lane_), begin(begin_), end(end_), left(left_), step(begin_), count(share.count - tile * TILE), second(GATED ? outputs : 8) {
        const int first = share.first + tile * TILE, t = lane % 4;
        const long long row = first + lane / 4;
        low = codes + row * LOW_ROW + begin * (STEP_K * LOW / 8) + t * LOW_BYTES;
        high = more_codes + row * HIGH_ROW + begin * (STEP_K * HIGH / 8) + t * HIGH_BYTES;
        groups.start(scales, lane, first, outputs);
        if (IN_SUPER_BLOCKS) blocks.start(super_scales, lane, first, outputs);
    }
    DEVICE void fetch(char* stage) {
        if (left <= 0) return;
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const bool valid = g + (GATED ? 0 : 8 * half) < count && (IS_EVEN || (step * UNITS + u) * UNIT_K + t * LANE_K < K);
                char* slot = stage + (2 * u + half) * ROW_SLOT;
                copy_piece<LOW_BYTES>(slot + lane * LOW_BYTES, low + half * second * LOW_ROW + u * (UNIT_K * LOW / 8), valid);
                copy_piece<HIGH_BYTES>(slot + 32 * LOW_BYTES + lane * HIGH_BYTES, high + half * second * HIGH_ROW + u * (UNIT_K * HIGH / 8), valid);
            }
        groups.fetch(stage + CODE_BYTES, lane, count, step);
        if (IN_SUPER_BLOCKS) blocks.fetch(stage + CODE_BYTES + GroupRecords::BYTES, lane, count, step);
        left--, step++;
        low += STEP_K * LOW / 8, high += STEP_K * HIGH / 8;
        if (step == end) {
            const int steps = end - begin;
            low += GROUPS * TILE * LOW_ROW - steps * (STEP_K * LOW / 8), high += GROUPS * TILE * HIGH_ROW - steps * (STEP_K * HIGH / 8);
            groups.next_tile();
            if (IN_SUPER_BLOCKS) blocks.next_tile();
            count -= GROUPS * TILE, step = begin;
        }
    }
};

// --- x ------------------------------------------------------------------------------------------------------------------

constexpr int LANE_VECTORS = LANE_K / 8;                                     // of 8 float16
constexpr int MAX_STEPS = (STEPS + CHUNKS - 1) / CHUNKS, MAX_UNITS = MAX_STEPS * UNITS;
constexpr int PASSES = (MAX_UNITS * UNIT_K / 8 + 31) / 32;                   // vectors of a row of x that a lane brings
constexpr int START_FLOATS = PAIRED ? 4 : 2;
constexpr int STARTS = MAX_UNITS * PARTS * SETS * 4;
static_assert(sizeof(T) == 2, "activations have 16 bits");

// What a warp has of x in shared memory, for its columns: `inverse` [row]: what sums are multiplied with, because x was;
// `starts` [unit][part][set][t]: where the sums of vectors 2t and 2t + 1 start, and if groups have zeros the sums of x as well;
// `vectors` [row][unit][LANE_VECTORS][t] of 16 bytes. The pitch of rows spreads the vectors that are read at once over all banks.
struct Operand {
    static constexpr int ROW = MAX_UNITS * LANE_VECTORS * 4, PITCH = ROW + 4, HEAD = 32 + STARTS * START_FLOATS * 4;

    float *inverse, *starts;
    uint4* vectors;
    int rows;

    static DEVICE int bytes(int rows) { return HEAD + PITCH * 16 * rows; }
    DEVICE Operand(char* memory, int rows_)
        : inverse((float*)memory), starts((float*)(memory + 32)), vectors((uint4*)(memory + HEAD)), rows(rows_) {}

    static DEVICE int place(int row, int vector) {
        const int unit = vector / (UNIT_K / 8), t = vector % (UNIT_K / 8) / LANE_VECTORS, v = vector % LANE_VECTORS;
        return row * PITCH + (unit * LANE_VECTORS + v) * 4 + t;
    }

    // A row's part in `value`, zeros behind its end.
    DEVICE void keep(int row, int lane, int count, const float (&value)[PASSES][8]) const {
        float largest = 0.f;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
#pragma unroll
            for (int e = 0; e < 8; e++) largest = fmaxf(largest, fabsf(value[pass][e]));
        // The power of two that makes it at least 2^14, less than 2^15.
        const unsigned exponent = max(warp_max_bits(__float_as_uint(largest)) >> 23, 16u);
        const float factor = __uint_as_float((268 - exponent) << 23), inverse_factor = __uint_as_float((exponent - 14) << 23);
        if (lane == 0) inverse[row] = inverse_factor * (CODING == E4M3 ? 256.f : 1.f);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int vector = pass * 32 + lane;
            unsigned packed[4];
            float start = 0.f, sum = 0.f;
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                constexpr float bias = raw_bias<f16>(CODING), middle = CODING == MIDDLE ? (float)(1 << (BITS - 1)) : 0.f;
                const float unit = CODING == E4M3 ? 1.f : raw_unit<f16>(BITS, CODING, pair);
                packed[pair] = pack2<f16>(value[pass][2 * pair] * (factor / unit), value[pass][2 * pair + 1] * (factor / unit));
                const float2 rounded = unpack2<f16>(packed[pair]);
                start -= (rounded.x + rounded.y) * (bias + middle * unit);
                sum += (rounded.x + rounded.y) * unit;
            }
            constexpr int CELL = (GROUP < UNIT_K ? GROUP : UNIT_K) / 8;      // vectors of a group, in a unit
            if (CODING != E4M3) start = warp_reduce<CELL>(start, Sum());
            if (PAIRED) sum = warp_reduce<CELL>(sum, Sum());
            if (vector >= count) continue;
            vectors[place(row, vector)] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
            if (CODING != E4M3 && vector % CELL == 0) {
                const int unit = vector / (UNIT_K / 8), cell = vector % (UNIT_K / 8) / CELL, part = cell % PARTS;
                const int n = row % SET_ROWS * SPANS + cell / PARTS;
                float* to = starts + (((unit * PARTS + part) * SETS + row / SET_ROWS) * 4 + n / 2) * START_FLOATS + n % 2;
                to[0] = start;
                if (PAIRED) to[2] = sum;
            }
        }
    }
};

// The weights of the norm for a lane's vectors, loaded in front of the wait.
struct LaneNorm {
    float value[PASSES][8];

    DEVICE void load(const float* weight, int first, int lane) {
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const float4* from = (const float4*)(weight + min(first + pass * 32 + lane, K / 8 - 1) * 8);
            const float4 a = __ldcg(from), b = __ldcg(from + 1);
            value[pass][0] = a.x, value[pass][1] = a.y, value[pass][2] = a.z, value[pass][3] = a.w;
            value[pass][4] = b.x, value[pass][5] = b.y, value[pass][6] = b.z, value[pass][7] = b.w;
        }
    }
};

// A lane's vectors of a row of x, as they are in memory.
struct RawRow {
    uint4 vector[PASSES];

    DEVICE void load(const T* row, int first, int lane) {
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) vector[pass] = load_fresh(row + min(first + pass * 32 + lane, K / 8 - 1) * 8);
    }
};

// Rows of x to shared memory: vectors [first, first + count) of each. `squares` gets the sums of the squares of these, or 0
// unless this warp `counts`: others have the same columns.
DEVICE void stage_rows(const Operand& operand, const T* x, int stride, const float2* stats, const LaneNorm& norm, int first, int count, int lane, bool counts, float* squares) {
    RawRow next;
    if (PROLOGUE != MERGE) next.load(x, first, lane);
#pragma unroll 1
    for (int row = 0; row < operand.rows; row++) {
        const RawRow raw = next;
        if (PROLOGUE != MERGE && row + 1 < operand.rows) next.load(x + (long long)(row + 1) * stride, first, lane);
        float value[PASSES][8], square = 0.f;
        if constexpr (PROLOGUE == MERGE)
            merge_splits(x + (long long)row * stride, stats + row * SPLITS * (K / HEAD_DIM), [&](int pass) { return min(first + pass * 32 + lane, K / 8 - 1); }, value);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const bool is_there = pass * 32 + lane < count && first + pass * 32 + lane < K / 8;
            if constexpr (PROLOGUE != MERGE) unpack(raw.vector[pass], value[pass], T());
            if (PROLOGUE == NORM && is_there) square += sum_of_squares(value[pass]);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if constexpr (PROLOGUE == NORM) value[pass][e] *= norm.value[pass][e];
                if (!is_there) value[pass][e] = 0.f;
            }
        }
        if (PROLOGUE == NORM) {
            square = warp_sum(square);
            if (lane == 0) squares[row * WARPS] = counts ? square : 0.f;
        }
        operand.keep(row, lane, count, value);
    }
}

// --- scales -----------------------------------------------------------------------------------------------------------------

// Elements of records that lie one after the other in shared memory, as floats. ALIGNMENT: of the first, in bytes.
template <typename S, int ALIGNMENT, int count> DEVICE void load_elements(float (&value)[count], const char* from) {
    constexpr int BYTES = count * (int)sizeof(S), WIDTH = lowest_bit(ALIGNMENT | lowest_bit(BYTES) | 16);
    unsigned word[(BYTES + 3) / 4];
    if constexpr (WIDTH >= 4) {
#pragma unroll
        for (int i = 0; i < BYTES / WIDTH; i++) load_piece<WIDTH>(word + i * (WIDTH / 4), from + i * WIDTH);
    } else {
#pragma unroll
        for (int i = 0; i < (BYTES + 3) / 4; i++) word[i] = 0;
#pragma unroll
        for (int i = 0; i < BYTES / WIDTH; i++) {
            const unsigned piece = WIDTH == 2 ? *(const unsigned short*)(from + 2 * i) : *(const unsigned char*)(from + i);
            word[i * WIDTH / 4] |= piece << i * WIDTH % 4 * 8;
        }
    }
#pragma unroll
    for (int i = 0; i < count; i++) {
        if constexpr (sizeof(S) == 4) value[i] = __uint_as_float(word[i]);
        else if constexpr (sizeof(S) == 2) value[i] = to_float(f16{(unsigned short)(word[i / 2] >> i % 2 * 16)});
        // As the lowest bits of 2^23: 2^23 + byte + 128.
        else value[i] = __uint_as_float(__byte_perm(word[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7440 + i % 4)) - 8388736.f;
    }
}

constexpr int LANE_GROUPS = (SPANS > 1 ? 2 : 1) * PARTS;                     // whose sums a lane holds, one after the other

// The records of a lane's groups of one row, in a unit.
struct Scales {
    float record[LANE_GROUPS * (PAIRED ? 2 : 1)], of_super[PAIRED ? 2 : 1];

    // slot: of the stage's records; r: row of the tile; row: the same, among all.
    DEVICE void load(const char* slot, int r, int row, int step, int unit, int t) {
        constexpr int UNIT_RECORD = UNIT_K / GROUP * RECORD, LANE_RECORD = LANE_GROUPS * RECORD;
        constexpr int ALIGNMENT = lowest_bit(GroupRecords::ALIGNMENT | UNIT_RECORD | LANE_RECORD | 16);
        const char* groups = slot + r * (GroupRecords::VECTORS * 16) + GroupRecords::offset(row, step);
        const int span = 2 * t % SPANS;
        load_elements<SCALE, ALIGNMENT>(record, groups + unit * UNIT_K / GROUP * RECORD + span * (PARTS * RECORD));
        if constexpr (!IS_EVEN) {
            // Behind the last column there is another row's, or nothing.
            constexpr int EACH = PAIRED ? 2 : 1;
#pragma unroll
            for (int i = 0; i < LANE_GROUPS * EACH; i++)
                if ((step * UNITS + unit) * UNIT_K + (span * PARTS + i / EACH) * GROUP >= K) record[i] = 0.f;
        }
        if constexpr (IN_SUPER_BLOCKS) {
            constexpr int EACH = PAIRED ? 4 : 2;
            const char* blocks = slot + GroupRecords::BYTES + r * (SuperRecords::VECTORS * 16) + SuperRecords::offset(row, step);
            load_elements<f16, lowest_bit(SuperRecords::ALIGNMENT | EACH)>(of_super, blocks + (step * STEP_K % 256 + unit * UNIT_K) / 256 * EACH);
            if (!IS_EVEN && (step * UNITS + unit) * UNIT_K >= K) of_super[0] = 0.f;
            if (!IS_EVEN && PAIRED && (step * UNITS + unit) * UNIT_K >= K) of_super[PAIRED ? 1 : 0] = 0.f;
        }
    }

    // sum + the products of groups [first, first + count): raw sums times scales; `x`: sums of x for the same groups.
    template <int count> DEVICE float apply(float sum, int first, const float (&product)[count], const float (&x)[count]) const {
        float products = IN_SUPER_BLOCKS ? 0.f : sum, minimums = 0.f;
#pragma unroll
        for (int i = 0; i < count; i++) {
            if constexpr (!PAIRED) {
                products += record[first + i] * product[i];
            } else {
                const float scale = record[2 * (first + i)], zero = record[2 * (first + i) + 1];
                if (CODING == ZEROS) products += scale * (product[i] - zero * x[i]);
                else if (IN_SUPER_BLOCKS) products += scale * product[i], minimums += zero * x[i];
                else products += scale * product[i] - zero * x[i];
            }
        }
        if constexpr (!IN_SUPER_BLOCKS) return products;
        sum += of_super[0] * products;
        if constexpr (PAIRED) sum -= of_super[1] * minimums;
        return sum;
    }
};

// --- the product --------------------------------------------------------------------------------------------------------------

constexpr int CHAINS = UNITS * PARTS * SETS < 4 ? 2 : 1;                     // of products that do not wait for each other

struct Multiplier {
    int g, t, lane;
    const uint4* x;                 // this lane's columns of its row of x in the first set
    bool is_mine[SETS];             // whether the lane's row in a set has anything in the lane's columns
    uint4 b[2][UNITS][SETS];        // vectors of x; always zeros in lanes that do not load any
    const float* starts;
    float sum[SETS][ROWS_OF_LANE][2];

    DEVICE Multiplier(const Operand& operand, int lane_) : g(lane_ / 4), t(lane_ % 4), lane(lane_) {
        x = operand.vectors + g / SPANS * Operand::PITCH + t;
        starts = operand.starts + t * START_FLOATS;
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            is_mine[s] = s * SET_ROWS + g / SPANS < operand.rows && g % SPANS == t * SPANS / 4;
#pragma unroll
            for (int i = 0; i < 2 * UNITS; i++) b[i / UNITS][i % UNITS][s] = make_uint4(0, 0, 0, 0);
        }
        clear();
    }
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < SETS * ROWS_OF_LANE * 2; i++) sum[i / (2 * ROWS_OF_LANE)][i / 2 % ROWS_OF_LANE][i % 2] = 0.f;
    }

    // A stage: step `step`. rows: of the tile's first row and of that of its second half.
    DEVICE void multiply(const char* stage, int step, const int (&rows)[2]) {
        unsigned words[UNITS][2][WORDS];
        float product[UNITS][SETS][PARTS][CHAINS][4], of_x[UNITS][SETS][PARTS][2];
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const char* slot = stage + (2 * u + half) * ROW_SLOT;
                load_piece<LOW_BYTES>(words[u][half], slot + lane * LOW_BYTES);
                if constexpr (HIGH_BYTES) load_piece<HIGH_BYTES>(words[u][half] + LOW_BYTES / 4, slot + 32 * LOW_BYTES + lane * HIGH_BYTES);
            }
#pragma unroll
            for (int s = 0; s < SETS; s++)
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    float start[START_FLOATS] = {};
                    if (CODING != E4M3) {
                        const float* from = starts + ((u * PARTS + part) * SETS + s) * (4 * START_FLOATS);
                        const Pack<float, START_FLOATS> pack = *(const Pack<float, START_FLOATS>*)from;
#pragma unroll
                        for (int i = 0; i < START_FLOATS; i++) start[i] = pack.item[i];
                    }
#pragma unroll
                    for (int i = 0; i < 4 * CHAINS; i++) product[u][s][part][i / 4][i % 4] = i < 4 ? start[i % 2] : 0.f;
#pragma unroll
                    for (int i = 0; i < 2; i++) of_x[u][s][part][i] = start[PAIRED ? 2 + i : i];
                }
        }
#pragma unroll
        for (int v = 0; v < LANE_VECTORS; v++) {
            uint4(&bv)[UNITS][SETS] = b[v % 2];
#pragma unroll
            for (int u = 0; u < UNITS; u++)
#pragma unroll
                for (int s = 0; s < SETS; s++)
                    if (is_mine[s]) bv[u][s] = x[(u * LANE_VECTORS + v) * 4 + s * (SET_ROWS * Operand::PITCH)];
#pragma unroll
            for (int pair = 4 * v; pair < 4 * v + 4; pair += 2)
#pragma unroll
                for (int u = 0; u < UNITS; u++) {
                    const unsigned a[4] = {
                        raw_pair<f16, BITS, CODING>(words[u][0], pair), raw_pair<f16, BITS, CODING>(words[u][1], pair),
                        raw_pair<f16, BITS, CODING>(words[u][0], pair + 1), raw_pair<f16, BITS, CODING>(words[u][1], pair + 1)};
                    const int part = 2 * pair * PARTS / LANE_K;
#pragma unroll
                    for (int s = 0; s < SETS; s++)
                        mma_16x8x16<f16>(product[u][s][part][pair / 2 % CHAINS], a, pair % 4 ? bv[u][s].z : bv[u][s].x, pair % 4 ? bv[u][s].w : bv[u][s].y);
                }
        }
#pragma unroll
        for (int i = 0; i < UNITS * SETS * PARTS * 4; i++) {
            float(&chains)[CHAINS][4] = product[i / (SETS * PARTS * 4)][i / (PARTS * 4) % SETS][i / 4 % PARTS];
            if (CHAINS == 2) chains[0][i % 4] += chains[CHAINS - 1][i % 4];
        }
        const char* records = stage + CODE_BYTES;
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Scales scales;
                scales.load(records, g + 8 * half, rows[half] + g, step, u, t);
#pragma unroll
                for (int s = 0; s < SETS; s++) add(sum[s], half, scales, product[u][s], of_x[u][s]);
            }
    }

    // Goes on to the columns of the next stage, or back by all `steps` of a tile.
    DEVICE void next_step() { x += UNITS * LANE_VECTORS * 4, starts += UNITS * PARTS * SETS * 4 * START_FLOATS; }
    DEVICE void rewind(int steps) { x -= steps * (UNITS * LANE_VECTORS * 4), starts -= steps * (UNITS * PARTS * SETS * 4 * START_FLOATS); }

    // To a set's sums of one of the lane's two rows of W.
    DEVICE void add(float (&to)[ROWS_OF_LANE][2], int half, const Scales& scales, const float (&product)[PARTS][CHAINS][4], const float (&of_x)[PARTS][2]) const {
        if constexpr (SPANS == 1) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float mine[1] = {product[0][0][2 * half + i]}, x_mine[1] = {of_x[0][i]};
                to[i][half] = scales.apply(to[i][half], 0, mine, x_mine);
            }
        } else {
            float mine[LANE_GROUPS], x_mine[LANE_GROUPS];
#pragma unroll
            for (int i = 0; i < LANE_GROUPS; i++) mine[i] = product[i % PARTS][0][2 * half + i / PARTS], x_mine[i] = of_x[i % PARTS][i / PARTS];
            to[0][half] = scales.apply(to[0][half], 0, mine, x_mine);
        }
    }

    // A tile's sums of this warp's columns.
    DEVICE void write(const PartialSums& sums, int chunk, int tile, const Operand& operand) {
#pragma unroll
        for (int s = 0; s < SETS; s++)
#pragma unroll
            for (int i = 0; i < ROWS_OF_LANE; i++) {
                const int row = s * SET_ROWS + (SPANS == 1 ? 2 * t + i : 2 * t / SPANS), output = tile * TILE + g;
                float low = sum[s][i][0], high = sum[s][i][1];
                if (SPANS == 4) low = warp_reduce<2>(low, Sum()), high = warp_reduce<2>(high, Sum());
                if (row >= operand.rows || (SPANS == 4 && t % 2)) continue;
                sums.at(0, chunk, row)[output] = low * operand.inverse[row];
                (GATED ? sums.at(1, chunk, row)[output] : sums.at(0, chunk, row)[output + 8]) = high * operand.inverse[row];
            }
        clear();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gemv_codes(
    const T* x, int x_stride, int rows, const float2* stats, const float* norm_weight, float eps,
    const char* codes, const char* more_codes, const char* scales, const char* super_scales, const float* bias,
    OUT* out, int out_stride, int outputs, int share, int extra, int launch_after) {
    __shared__ float squares[SLOTS * WARPS];
    const Share mine = share_of_block(share, extra);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / CHUNKS, chunk = warp % CHUNKS;
    const int ring = warp * (STAGES * STAGE_BYTES);
    char* of_warps = shared_memory + WARPS * STAGES * STAGE_BYTES;
    const Operand operand(of_warps + warp * Operand::bytes(rows), rows);
    // The pitch spreads the sums of a tile over all banks.
    const PartialSums sums = {(float*)(of_warps + WARPS * Operand::bytes(rows)), (share + 16) / 16 * 16 + 4, rows};

    const int tiles = (mine.count + TILE - 1) / TILE, own_tiles = tiles > group ? (tiles - group + GROUPS - 1) / GROUPS : 0;
    const int begin = STEPS * chunk / CHUNKS, end = STEPS * (chunk + 1) / CHUNKS;
    const int count = own_tiles * (end - begin);
    Fetcher fetcher(lane, codes, more_codes, scales, super_scales, outputs, mine, group, begin, end, count);
#pragma unroll 1
    for (int stage = 0; stage < STAGES; stage++) {
        keep_pace(stage, count);
        fetcher.fetch(shared_memory + ring + stage * STAGE_BYTES);
        commit_copies();
    }
    if (launch_after == 0 || launch_after > count) launch_next();

    Outputs results(out, out_stride, outputs, rows, mine, bias);
    const int first = begin * (STEP_K / 8), vectors = (end - begin) * (STEP_K / 8);
    LaneNorm norm;
    if constexpr (PROLOGUE == NORM) norm.load(norm_weight, first, lane);
    wait_for_previous();
    results.load_addend();
    stage_rows(operand, x, x_stride, stats, norm, first, vectors, lane, group == 0, squares + warp);
    __syncwarp();

    Multiplier multiplier(operand, lane);
    int stage = ring, tile = group, step = begin;
    for (int i = 0; i < count; i++) {
        wait_for_copies<STAGES - 1>();
        __syncwarp();  // records are copied by other lanes
        const int row = mine.first + tile * TILE, of_tile[2] = {row, row + (GATED ? outputs : 8)};
        multiplier.multiply(shared_memory + stage, step, of_tile);
        multiplier.next_step();
        __syncwarp();
        fetcher.fetch(shared_memory + stage);
        commit_copies();
        stage = stage == ring + (STAGES - 1) * STAGE_BYTES ? ring : stage + STAGE_BYTES;
        if (i + 1 == launch_after) launch_next();
        if (++step == end) {
            multiplier.write(sums, chunk, tile, operand);
            multiplier.rewind(end - begin);
            step = begin, tile += GROUPS;
        }
    }
    __syncthreads();
    results.write(sums, [&](int row) { return PROLOGUE == NORM ? norm_scale(squares + row * WARPS, eps) : 1.f; });
}
