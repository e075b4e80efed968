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
#include "gemm_wgmma.cuh"

// Where things lie in shared memory.
struct Layout {
    unsigned stages, staging, partials, full, empty, residual, partials_full, flags;
    DEVICE Layout() {
        stages = (shared_address(shared_memory) + 1023) & ~1023u;
        staging = stages + STAGES * STAGE_BYTES;
        partials = stages + PARTIALS_AT;
        full = stages + BARRIERS_AT;              // a stage has been filled
        empty = full + 8 * STAGES;                // ... and read
        residual = empty + 8 * STAGES;            // a chunk of Y has come; two for each warpgroup
        partials_full = residual + 16 * GROUPS;
        flags = partials_full + 8;                // a word for each warpgroup
    }
};

// The tiles that a block works on, and its part of their K: the same sequence for whoever copies and whoever multiplies.
struct Work {
    int steps, raster, tiles_p, tiles_q;
    unsigned at, end, stride;
    int p, q, begin, stop, tile;

    DEVICE Work(int steps_, int all_p, int all_q, int raster_, unsigned cluster, unsigned clusters) {
        steps = steps_, raster = raster_;
        tiles_p = SHARING && !SHARE_P ? ceil_div(all_p, CLUSTER) : all_p;
        tiles_q = SHARING && SHARE_P ? ceil_div(all_q, CLUSTER) : all_q;
        unsigned total = tiles_p * tiles_q;
        if (SPLIT == 1) at = total * steps * cluster / clusters, end = total * steps * (cluster + 1) / clusters, stride = 0;
        else at = cluster, end = total, stride = clusters;
    }
    DEVICE bool next(int rank) {
        if (at >= end) return false;
        if (SPLIT == 1) {
            tile = at / steps, begin = at - tile * steps, stop = min(steps, (int)(begin + end - at));
            at += stop - begin;
        } else {
            tile = at, begin = 0, stop = steps;
            at += stride;
        }
        if (SPLIT == 2) begin = steps * rank / CLUSTER, stop = steps * (rank + 1) / CLUSTER;
        const Tile place = tile_at(tile, tiles_p, tiles_q, raster);
        p = place.p, q = place.q;
        if (SHARING && !SHARE_P) p = p * CLUSTER + rank;
        if (SHARING && SHARE_P) q = q * CLUSTER + rank;
        return true;
    }
};

// A position in the ring of stages.
struct Ring {
    int stage = 0;
    unsigned parity = 0;
    DEVICE void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

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

// --- sums of the parts of a tile -------------------------------------------------------------------------------------------

// SPLIT 2: send the sums to the first block of the cluster, or, being that, add those that come. Whether to go on.
DEVICE bool merge_in_cluster(float (&acc)[ACCUMULATORS], const Layout& at, int rank, int group, int thread) {
    const unsigned slot = at.partials + (group * (ACCUMULATORS / 4) * 128 + thread) * 16;
    if (rank > 0) {
        const unsigned to = remote_address(slot + (rank - 1) * PARTIAL_BYTES, 0), barrier = remote_address(at.partials_full, 0);
#pragma unroll
        for (int i = 0; i < ACCUMULATORS / 4; i++)
            store_remote(to + i * 2048, barrier, acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
        return false;
    }
    wait_barrier(at.partials_full, 0);
#pragma unroll
    for (int c = 0; c < CLUSTER - 1; c++)
#pragma unroll
        for (int i = 0; i < ACCUMULATORS / 4; i++) {
            const float4 v = load_shared(slot + c * PARTIAL_BYTES + i * 2048);
            acc[4 * i] += v.x, acc[4 * i + 1] += v.y, acc[4 * i + 2] += v.z, acc[4 * i + 3] += v.w;
        }
    return true;
}

// SPLIT 1: leave the sums of a part of a tile in `workspace`; the last block to do so adds all of them up. Whether that
// is this one. `counters` are zero before and after.
DEVICE bool merge_in_workspace(float (&acc)[ACCUMULATORS], const Layout& at, const Work& work, int rank, int group, int thread,
                               float4* workspace, unsigned* counters) {
    const unsigned cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const unsigned total = (unsigned)work.tiles_p * work.tiles_q * work.steps, low = (unsigned)work.tile * work.steps;
    // A block has at most two parts of tiles that it shares: the last of one tile and the first of the next.
    auto part = [&](unsigned c) {
        unsigned slot = 2 * (c * CLUSTER + rank) + (total * c / clusters < low ? 1 : 0);
        return workspace + ((unsigned long long)slot * GROUPS + group) * (ACCUMULATORS / 4) * 128 + thread;
    };
    float4* mine = part(cluster);
#pragma unroll
    for (int i = 0; i < ACCUMULATORS / 4; i++)
        __stcg(mine + i * 128, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
    unsigned first = low * clusters / total;  // clusters whose share meets steps low ... low + steps: first ... last
    while (total * (first + 1) / clusters <= low) first++;
    unsigned last = first;
    while (total * (last + 1) / clusters < low + work.steps) last++;

    sync_warpgroup(group + 1);
    if (thread == 0) {  // after the barrier, one thread's fence publishes what the whole group wrote
        unsigned* counter = counters + (work.tile * CLUSTER + rank) * GROUPS + group;
        __threadfence();
        unsigned is_last = atomicAdd(counter, 1u) == last - first;
        if (is_last) *counter = 0;
        __threadfence();
        store_shared_word(at.flags + 4 * group, is_last);
    }
    sync_warpgroup(group + 1);
    if (!load_shared_word(at.flags + 4 * group)) return false;

#pragma unroll
    for (int i = 0; i < ACCUMULATORS; i++) acc[i] = 0.f;
    constexpr int BATCH = ACCUMULATORS <= 8 ? 8 : ACCUMULATORS <= 16 ? 4 : ACCUMULATORS <= 32 ? 2 : 1;  // parts under way at a time
    for (unsigned c = first; c <= last; c += BATCH) {
        float4 v[BATCH][ACCUMULATORS / 4];
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const bool there = c + u <= last;
            const float4* from = part(there ? c + u : c);
#pragma unroll
            for (int i = 0; i < ACCUMULATORS / 4; i++) v[u][i] = there ? __ldcg(from + i * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
#pragma unroll
        for (int u = 0; u < BATCH; u++)
#pragma unroll
            for (int i = 0; i < ACCUMULATORS / 4; i++)
                acc[4 * i] += v[u][i].x, acc[4 * i + 1] += v[u][i].y, acc[4 * i + 2] += v[u][i].z, acc[4 * i + 3] += v[u][i].w;
    }
    return true;
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
