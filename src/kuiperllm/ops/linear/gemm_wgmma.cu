// Matrix product for Hopper: Y[M, N] = X[M, K] W[N, K]^T (+ bias), float32 sums, by wgmma on tiles that the bulk copy
// engine brings. One thread of a block copies; its other warpgroups multiply 64 rows each and write results back.
//
// An output tile is TILE_P x TILE_Q, where P is the operand whose rows are wgmma's rows and Q the one whose rows are its
// columns. Many rows of X: P = X, Q = W. Few (SWAP): P = W, Q = X, and tiles of Y^T are transposed on the way out.
//
//   T             bf16 or f16: elements of X and W; OUT: elements of Y
//   TILE_P, TILE_Q, STAGES: the tile, and how many pieces of 64 columns of K are under way
//   CLUSTER       blocks that work side by side. Along P they share the tile of Q (SHARE_P: along Q that of P), each
//                 copying a part of it to all. With SPLIT 2 they share K instead
//   SPLIT         0: a block computes whole tiles. 1: the steps through K of all tiles are dealt out evenly; the last block
//                 to arrive at a tile sums its parts in a fixed order, so results do not depend on timing.
//                 2: the blocks of a cluster each take a part of K, and send their sums to the first one
//   RESIDENT      blocks on a multiprocessor at a time
//   STREAM        1: W is read once: the second-level cache drops it first and keeps X
//   EARLY         1: W is constant. 0: the kernel in front may write it
//   DIRECT        1: threads write Y themselves (any type, any alignment); 0: the copy engine does (OUT = T)
// EPILOGUE, BIAS: see gemm.cuh; with EPILOGUE 2, F is a multiple of 8.
constexpr int STEP = 64;  // as wide as rows can be that the copy engine swizzles: 128 bytes
constexpr int P_BYTES = TILE_P * 128;
#include "gemm_work.cuh"

// --- copying ---------------------------------------------------------------------------------------------------------------

// One operand as the copying thread sees it. PAIRED: its map has tiles of 8 gate rows, 8 up rows, 8 gate rows, ...
template <int TILE, int ROWS, bool PAIRED> struct Source {
    const TensorMap* map;
    Policy policy;
    DEVICE void load(unsigned stage, unsigned barrier, int step, int tile, int rank) const {
        const int part = ROWS < TILE ? rank * ROWS : 0, row = tile * TILE + part, k = step * STEP;
        const unsigned to = stage + part * 128;
        constexpr unsigned short all = (1 << CLUSTER) - 1;
        if (PAIRED && ROWS < TILE) load_tile_shared(to, map, barrier, policy, all, k, 0, 0, row / 16);
        else if (PAIRED) load_tile(to, map, barrier, policy, k, 0, 0, row / 16);
        else if (ROWS < TILE) load_tile_shared(to, map, barrier, policy, all, k, row);
        else load_tile(to, map, barrier, policy, k, row);
    }
};

DEVICE void copy_operands(const Layout& at, Work work, int rank, const TensorMap* map_p, const TensorMap* map_q) {
    const Policy of_w = STREAM ? EVICT_FIRST : EVICT_NORMAL, of_x = STREAM ? EVICT_LAST : EVICT_NORMAL;
    const Source<TILE_P, ROWS_P, SWAP && GATED> operand_p = {map_p, SWAP ? of_w : of_x};
    const Source<TILE_Q, ROWS_Q, !SWAP && GATED> operand_q = {map_q, SWAP ? of_x : of_w};
    auto load_p = [&](const Work& w, int step, int s) { operand_p.load(at.stages + s * STAGE_BYTES, at.full + 8 * s, step, w.p, rank); };
    auto load_q = [&](const Work& w, int step, int s) { operand_q.load(at.stages + s * STAGE_BYTES + P_BYTES, at.full + 8 * s, step, w.q, rank); };

    if (!EARLY) wait_for_previous();
    int ahead = 0;  // the weights of the first stages do not depend on the kernel in front
    Work w = work;
    while (ahead < STAGES && w.next(rank))
        for (int step = w.begin; step < w.stop && ahead < STAGES; step++, ahead++) {
            arrive_expecting(at.full + 8 * ahead, STAGE_BYTES);
            if (SWAP) load_p(w, step, ahead);
            else load_q(w, step, ahead);
        }
    wait_for_previous();
    Ring ring;
    while (work.next(rank))
        for (int step = work.begin; step < work.stop; step++) {
            if (ahead > 0) {
                ahead--;
                if (SWAP) load_q(work, step, ring.stage);
                else load_p(work, step, ring.stage);
            } else {
                wait_barrier(at.empty + 8 * ring.stage, ring.parity ^ 1);
                arrive_expecting(at.full + 8 * ring.stage, STAGE_BYTES);
                load_p(work, step, ring.stage);
                load_q(work, step, ring.stage);
            }
            ring.advance();
        }
}

// --- the kernel --------------------------------------------------------------------------------------------------------------

// Args: map_p, map_q: tiles of the operands; map_y: chunks of Y, unless DIRECT; out, stride: Y, if DIRECT; rows, width: of Y;
// steps: ceil(K / 64); tiles_p, tiles_q, raster: see Work; workspace, counters: for SPLIT 1.
extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), RESIDENT)
gemm(const __grid_constant__ TensorMap map_p, const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_y,
     const float* bias, OUT* out, long long stride, int rows, int width, int steps, int tiles_p, int tiles_q, int raster,
     float4* workspace, unsigned* counters) {
    const Layout at;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, group = threadIdx.x >> 7;
    launch_next();
    if (threadIdx.x == 128 * GROUPS) {
        prefetch_map(&map_p);
        prefetch_map(&map_q);
        if (!DIRECT) prefetch_map(&map_y);
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(at.full + 8 * i, 1);
            init_barrier(at.empty + 8 * i, 4 * GROUPS * (SHARING ? CLUSTER : 1));  // an arrival of each warp that reads the stage
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

    if (group == GROUPS) {
        if (GROUPS == 2 && RESIDENT == 1) shrink_registers<40>();
        if (GROUPS == 3) shrink_registers<32>();
        if (threadIdx.x == GROUPS * 128) copy_operands(at, work, rank, &map_p, &map_q);
    } else {
        if (GROUPS == 2 && RESIDENT == 1) grow_registers<232>();
        if (GROUPS == 3) grow_registers<160>();
        const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
        Chunks chunks = {&map_y, at.staging + group * 2 * CHUNK_BYTES, at.residual + 16 * group, 0, 0, group, thread};
        auto release = [&](int stage) {
            if (!SHARING) {
                if (lane == 0) arrive(at.empty + 8 * stage);
            } else if (lane < CLUSTER) arrive_remote(at.empty + 8 * stage, lane);
        };
        float acc[ACCUMULATORS];
        Ring ring;
        wait_for_previous();
        while (work.next(rank)) {
            const int along_p = (work.p * TILE_P + group * 64) / (SWAP && GATED ? 2 : 1);
            const int along_q = work.q * TILE_Q / (!SWAP && GATED ? 2 : 1);
            const int x = SWAP ? along_p : along_q, y = SWAP ? along_q : along_p;
            const bool early = EPILOGUE == 1 && !DIRECT && (SPLIT == 0 || (SPLIT == 2 && rank == 0));
            if (early) chunks.fetch_first(x, y);

            int previous = 0;
            for (int step = work.begin; step < work.stop; step++) {
                wait_barrier(at.full + 8 * ring.stage, ring.parity);
                const unsigned stage = at.stages + ring.stage * STAGE_BYTES;
                const unsigned long long p = matrix_descriptor(stage + group * 8192), q = matrix_descriptor(stage + P_BYTES);
                begin_products();
#pragma unroll
                for (int k = 0; k < 4; k++) wgmma<T>(acc, p + 2 * k, q + 2 * k, k > 0 || step > work.begin);  // 32 bytes of K each
                commit_products();
                wait_for_products<1>();
                if (step > work.begin) release(previous);
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
