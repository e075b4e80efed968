// What products on Hopper have in common: where things lie in shared memory, which tiles a block works on, and how the sums of
// tiles whose columns of K are shared out come together. See gemm_wgmma.cu for the template parameters.
#pragma once
#include "gemm_wgmma.cuh"

// Where things lie in shared memory.
struct Layout {
    unsigned stages, staging, partials, full, empty, residual, partials_full, flags, end;
    DEVICE Layout() {
        stages = (shared_address(shared_memory) + 1023) & ~1023u;
        staging = stages + STAGES * STAGE_BYTES;
        partials = stages + PARTIALS_AT;
        full = stages + BARRIERS_AT;              // a stage has been filled
        empty = full + 8 * STAGES;                // ... and read
        residual = empty + 8 * STAGES;            // a chunk of Y has come; two for each warpgroup
        partials_full = residual + 16 * GROUPS;
        flags = partials_full + 8;                // a word for each warpgroup
        end = flags + 4 * GROUPS;
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
