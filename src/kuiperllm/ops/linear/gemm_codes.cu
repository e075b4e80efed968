// Matrix product for Hopper with quantized weights: Y[M, N] = X[M, K] W[N, K]^T (+ bias), float32 sums. What gemm_wgmma.cu says
// holds here as well, with P = W (SWAP is 1, SHARE_P is 0).
//
// The copy engine brings codes as they lie in memory. Three warps beside the one that copies make factors of the scales, once
// for all who need them. The warpgroups that multiply turn the codes of their 64 rows into T in registers, from where wgmma
// takes its first operand; meanwhile the tensor cores multiply what was turned before.
//
//   BITS, CODING, SCALE   see fragments.cuh
//   GROUP                 columns that share a scale: 16, 32, or a multiple of 64
//   STEP                  columns of K in a stage: 64 or 128, of which K is a multiple
#include "fragments.cuh"

// Bytes of a row of W in a stage. Of a plane of one bit 16 are the least that can be copied; 64 columns are half of them.
constexpr int LOW_ROW = LOW_BITS * STEP / 8, HIGH_ROW = HIGH_BITS == 1 ? 16 : HIGH_BITS * STEP / 8;
constexpr int P_BYTES = TILE_P * (LOW_ROW + HIGH_ROW);

#include "gemm_work.cuh"

constexpr int PART = 64;  // columns that are turned to operands together, and those of a piece of X as the copy engine swizzles it
constexpr int STEP_GROUPS = GROUP < STEP ? STEP / GROUP : 1, PART_GROUPS = GROUP < PART ? PART / GROUP : 1;
constexpr int FACTORS_BYTES = STEP_GROUPS * TILE_P * (HAS_ZEROS ? 8 : 4);
constexpr int HELPERS = 3;       // warps that make factors, each of every third stage
constexpr int OPERANDS = TILE_Q > 128 ? 2 : 4;  // in registers: one that is made, and others that are multiplied
static_assert(STAGES >= HELPERS, "a helper must not be two phases of a barrier ahead");
static_assert((PART % GROUP == 0 || GROUP % PART == 0) && STEP % PART == 0 && SWAP && !SHARE_P, "what this kernel takes");

// --- copying ---------------------------------------------------------------------------------------------------------------

struct Maps { const TensorMap *low, *high, *x; };

DEVICE void copy_codes(const Maps& maps, unsigned stage, unsigned barrier, const Work& work, int step) {
    const Policy policy = STREAM ? EVICT_FIRST : EVICT_NORMAL;
    const int row = work.p * TILE_P, low = step * LOW_ROW, high = step * STEP * HIGH_BITS / 8 / 16 * 16;  // bytes
    if (GATED) load_tile(stage, maps.low, barrier, policy, low, 0, 0, row / 16);
    else load_tile(stage, maps.low, barrier, policy, low, row);
    if (!HIGH_BITS) return;
    if (GATED) load_tile(stage + TILE_P * LOW_ROW, maps.high, barrier, policy, high, 0, 0, row / 16);
    else load_tile(stage + TILE_P * LOW_ROW, maps.high, barrier, policy, high, row);
}

DEVICE void copy_x(const Maps& maps, unsigned stage, unsigned barrier, const Work& work, int step, int rank) {
    const Policy policy = STREAM ? EVICT_LAST : EVICT_NORMAL;
    const int part = ROWS_Q < TILE_Q ? rank * ROWS_Q : 0, row = work.q * TILE_Q + part;
#pragma unroll
    for (int k = 0; k < STEP; k += PART) {
        const unsigned to = stage + P_BYTES + k * TILE_Q * 2 + part * 128;
        if (ROWS_Q < TILE_Q) load_tile_shared(to, maps.x, barrier, policy, (1 << CLUSTER) - 1, step * STEP + k, row);
        else load_tile(to, maps.x, barrier, policy, step * STEP + k, row);
    }
}

DEVICE void copy_operands(const Layout& at, Work work, int rank, const Maps& maps) {
    int ahead = 0;  // the weights of the first stages do not depend on the kernel in front
    Work w = work;
    while (ahead < STAGES && w.next(rank))
        for (int step = w.begin; step < w.stop && ahead < STAGES; step++, ahead++) {
            arrive_expecting(at.full + 8 * ahead, STAGE_BYTES);
            copy_codes(maps, at.stages + ahead * STAGE_BYTES, at.full + 8 * ahead, w, step);
        }
    wait_for_previous();
    Ring ring;
    while (work.next(rank))
        for (int step = work.begin; step < work.stop; step++) {
            const unsigned stage = at.stages + ring.stage * STAGE_BYTES, full = at.full + 8 * ring.stage;
            if (ahead > 0) ahead--;
            else {
                wait_barrier(at.empty + 8 * ring.stage, ring.parity ^ 1);
                arrive_expecting(full, STAGE_BYTES);
                copy_codes(maps, stage, full, work, step);
            }
            copy_x(maps, stage, full, work, step, rank);
            ring.advance();
        }
}

// --- factors -----------------------------------------------------------------------------------------------------------------

// Where a stage's factors lie: for each group of columns those of all rows, rows r and r + 8 beside each other.
DEVICE char* factors_of(const Layout& at, int stage) {
    return shared_memory + (((at.end + 15) & ~15u) - shared_address(shared_memory)) + stage * FACTORS_BYTES;
}
DEVICE int factor_at(int group, int row) { return group * TILE_P + (row & ~15) + (row & 7) * 2 + (row >> 3 & 1); }

// Scales in memory: of the whole matrix, N rows (F gate rows and F up rows, if GATED) of K columns.
struct Scales {
    static constexpr int PARTS = HAS_ZEROS ? 2 : 1;
    const SCALE* of_groups;
    const f16* of_super_blocks;
    int width, columns;

    // Makes the factors of row `r` of the tile.
    DEVICE void convert(char* factors, const Work& work, int step, int r) const {
        const int n = work.p * (GATED ? TILE_P / 2 : TILE_P) + (GATED ? r / 16 * 8 + r % 8 : r);
        Pack<SCALE, PARTS * STEP_GROUPS> stored = {};
        Pack<f16, PARTS> d = {};
        if (n < width) {
            const long long row = GATED && r / 8 % 2 ? n + width : n, group = row * (columns / GROUP) + step * STEP / GROUP;
            stored = *(const Pack<SCALE, PARTS * STEP_GROUPS>*)(of_groups + PARTS * group);
            if (sizeof(SCALE) == 1) d = ((const Pack<f16, PARTS>*)of_super_blocks)[row * (columns / 256) + step * STEP / 256];
        }
#pragma unroll
        for (int j = 0; j < STEP_GROUPS; j++) {
            float scale = to_float(stored.item[PARTS * j]), zero = HAS_ZEROS ? to_float(stored.item[PARTS * j + PARTS - 1]) : 0.f;
            if (sizeof(SCALE) == 1) scale *= to_float(d.item[0]), zero *= to_float(d.item[PARTS - 1]);
            const PairGroup group = pair_group<T>(scale, zero);
            if (HAS_ZEROS) ((PairGroup*)factors)[factor_at(j, r)] = group;
            else ((unsigned*)factors)[factor_at(j, r)] = group.factor;
        }
    }
};

// Work of one of the helping warps: some rows at a time, as many as there are registers for.
constexpr int ROWS_TOGETHER = STEP_GROUPS * Scales::PARTS < 8 ? 4 : STEP_GROUPS * Scales::PARTS < 16 ? 2 : 1;
DEVICE void make_factors(const Layout& at, Work work, int rank, const Scales& scales, int helper, int lane) {
    Ring ring;
    int turn = 0;
    while (work.next(rank))
        for (int step = work.begin; step < work.stop; step++) {
            if (turn == helper) {
                wait_barrier(at.empty + 8 * ring.stage, ring.parity ^ 1);
#pragma unroll(ROWS_TOGETHER)
                for (int r = 0; r < TILE_P; r += 32) scales.convert(factors_of(at, ring.stage), work, step, r + lane);
                arrive(at.full + 8 * ring.stage);
            }
            if (++turn == HELPERS) turn = 0;
            ring.advance();
        }
}

// --- operands ----------------------------------------------------------------------------------------------------------------

// Bytes of a row of a plane in a stage, from column `k` of its STEP columns on; the copy engine has swizzled pieces of 16.
template <int ROW, int N> DEVICE void load_plane(unsigned (&words)[N], const char* plane, int row, int byte) {
    const int swizzle = ROW == 128 ? row & 7 : ROW == 64 ? row >> 1 & 3 : ROW == 32 ? row >> 2 & 1 : 0;
    constexpr int PIECE = N < 4 ? N : 4;
#pragma unroll
    for (int i = 0; i < N; i += PIECE) {
        unsigned piece[PIECE];
        load_words(piece, plane + row * ROW + (((byte / 16 + i / 4) ^ swizzle) << 4) + byte % 16);
#pragma unroll
        for (int j = 0; j < PIECE; j++) words[i + j] = piece[j];
    }
}

// What a thread needs to make its share of wgmma's first operand, of PART columns: of rows g and g + 8 of its warp's 16.
struct Rows {
    Codes<PART> codes[2];
    PairGroup groups[PART_GROUPS][2];

    // From column `k` of a stage's STEP on, where the 64 columns of a plane of one bit may be the second half of 128.
    DEVICE void load(const char* stage, const char* factors, int row, int step, int k) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            load_plane<LOW_ROW>(codes[i].low, stage, row + 8 * i, k * LOW_BITS / 8);
            if (!HIGH_BITS) continue;
            const int byte = HIGH_BITS == 1 && STEP == 64 ? step % 2 * 8 : k * HIGH_BITS / 8;
            load_plane<HIGH_ROW>(codes[i].high, stage + TILE_P * LOW_ROW, row + 8 * i, byte);
        }
#pragma unroll
        for (int j = 0; j < PART_GROUPS; j++) {
            const int at = factor_at((GROUP < STEP ? k / GROUP : 0) + j, row);
            if (HAS_ZEROS) {
                const uint4 v = *(const uint4*)((const PairGroup*)factors + at);
                groups[j][0] = {v.x, v.y}, groups[j][1] = {v.z, v.w};
            } else {
                const uint2 v = *(const uint2*)((const unsigned*)factors + at);
                groups[j][0].factor = v.x, groups[j][1].factor = v.y;
            }
        }
    }
    // Columns 16 s ... 16 s + 15 of them.
    DEVICE void turn(unsigned (&a)[4], int s, const Place& place) const {
        const PairGroup(&group)[2] = groups[GROUP < PART ? s * 16 / GROUP : 0];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = codes[i % 2].weights<T>(2 * s + i / 2, place, group[i % 2]);
    }
};

// --- the kernel --------------------------------------------------------------------------------------------------------------

// Args: map_low, map_high: tiles of the planes of W (the second is not looked at if there is none); map_x: of X; map_y: chunks of
// Y, unless DIRECT; scales, super_scales: of W; out, stride: Y, if DIRECT; rows, width: of Y; columns: K; tiles_p, tiles_q,
// raster: see Work; workspace, counters: for SPLIT 1.
extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), RESIDENT)
gemm(const __grid_constant__ TensorMap map_low, const __grid_constant__ TensorMap map_high, const __grid_constant__ TensorMap map_x,
     const __grid_constant__ TensorMap map_y, const SCALE* scales, const f16* super_scales, const float* bias, OUT* out, long long stride,
     int rows, int width, int columns, int tiles_p, int tiles_q, int raster, float4* workspace, unsigned* counters) {
    const Layout at;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, group = threadIdx.x >> 7, steps = columns / STEP;
    launch_next();
    if (threadIdx.x == 128 * GROUPS) {
        prefetch_map(&map_low);
        if (HIGH_BITS) prefetch_map(&map_high);
        prefetch_map(&map_x);
        if (!DIRECT) prefetch_map(&map_y);
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(at.full + 8 * i, 1 + 32);  // for the copies, and for the lanes that make factors
            init_barrier(at.empty + 8 * i, 4 * GROUPS * (SHARING ? CLUSTER : 1));
        }
        for (int i = 0; i < 2 * GROUPS; i++) init_barrier(at.residual + 8 * i, 1);
        if (SPLIT == 2) {
            init_barrier(at.partials_full, 1);
            arrive_expecting(at.partials_full, (CLUSTER - 1) * PARTIAL_BYTES);
        }
        publish_barriers();
    }
    if (CLUSTER > 1) sync_cluster();
    else __syncthreads();
    Work work(steps, tiles_p, tiles_q, raster, blockIdx.x / CLUSTER, gridDim.x / CLUSTER);
    const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;

    if (group == GROUPS) {
        if (GROUPS == 2 && RESIDENT == 1) shrink_registers<88>();
        if (GROUPS == 3) shrink_registers<80>();
        if (thread == 0) copy_operands(at, work, rank, {&map_low, &map_high, &map_x});
        if (warp > 0) make_factors(at, work, rank, {scales, super_scales, width, columns}, warp - 1, lane);
        wait_for_previous();
    } else {
        if (GROUPS == 2 && RESIDENT == 1) grow_registers<208>();
        if (GROUPS == 3) grow_registers<144>();
        Chunks chunks = {&map_y, at.staging + group * 2 * CHUNK_BYTES, at.residual + 16 * group, 0, 0, group, thread};
        auto release = [&](int stage) {
            if (!SHARING) {
                if (lane == 0) arrive(at.empty + 8 * stage);
            } else if (lane < CLUSTER) arrive_remote(at.empty + 8 * stage, lane);
        };
        const char* stages = shared_memory + (at.stages - shared_address(shared_memory));
        const int row = group * 64 + warp * 16 + lane / 4;
        const Place place(lane % 4);
        float acc[ACCUMULATORS];
        Ring ring;
        wait_for_previous();
        while (work.next(rank)) {
            const int x = (work.p * TILE_P + group * 64) / (GATED ? 2 : 1), y = work.q * TILE_Q;
            const bool early = EPILOGUE == 1 && !DIRECT && (SPLIT == 0 || (SPLIT == 2 && rank == 0));
            if (early) chunks.fetch_first(x, y);

            int previous = 0;
            unsigned a[OPERANDS][4];
            for (int step = work.begin; step < work.stop; step++) {
                wait_barrier(at.full + 8 * ring.stage, ring.parity);
                const unsigned stage = ring.stage * STAGE_BYTES;
#pragma unroll
                for (int k = 0; k < STEP; k += PART) {
                    const unsigned long long q = matrix_descriptor(at.stages + stage + P_BYTES + k * TILE_Q * 2);
                    Rows weights;
                    weights.load(stages + stage, factors_of(at, ring.stage), row, step, k);
#pragma unroll
                    for (int s = 0; s < 4; s++) {  // 16 columns each
                        weights.turn(a[s % OPERANDS], s, place);
                        begin_products();
                        wgmma<T>(acc, a[s % OPERANDS], q + 2 * s, k + s > 0 || step > work.begin);
                        commit_products();
                        wait_for_products<OPERANDS - 1>();  // the operand that is made next has been multiplied
                        if (k == 0 && s == OPERANDS - 2 && step > work.begin) release(previous);
                    }
                }
                previous = ring.stage;
                ring.advance();
            }
            wait_for_products<0>();
            release(previous);

            if (SPLIT == 2 && !merge_in_cluster(acc, at, rank, group, thread)) continue;
            if (SPLIT == 1 && !(work.begin == 0 && work.stop == steps) &&
                !merge_in_workspace(acc, at, work, rank, group, thread, workspace, counters)) continue;
            if (BIAS) add_bias(acc, bias, width, x, warp, lane);
            if (DIRECT) write_direct(acc, Result(out, stride, rows, width), x, y, warp, lane);
            else {
                if (EPILOGUE == 1 && !early) chunks.fetch_first(x, y);
                chunks.write(acc, x, y, warp, lane);
            }
        }
        if (!DIRECT && thread == 0) wait_for_stores<0>();
    }
    if (CLUSTER > 1) {  // nobody leaves while others may still write to its shared memory
        __syncwarp();
        sync_cluster();
    }
}
