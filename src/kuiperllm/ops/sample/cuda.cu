// CUDA kernels of `sample`; sampling.cuh says how they work together.
#include "sampling.cuh"

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
sample_range(const float* logits, RowState* states, int width, long long stride, int blocks) {
    __shared__ u64 keys[ROW_WARPS];
    __shared__ float values[ROW_WARPS];
    __shared__ unsigned highest[ROW_WARPS][32];
    launch_next();
    wait_for_previous();
    int index = blockIdx.x / blocks, part = blockIdx.x % blocks, warp = threadIdx.x >> 5;
    RowState& state = states[index];
    for (int i = part * ROW_THREADS + threadIdx.x; i < BINS; i += blocks * ROW_THREADS) {
        state.counts[i] = 0;
        state.masses[i] = 0;
    }
    u64 greatest = 0;
    float lowest = -minus_infinity();
    Row row(logits, index, stride, width);
    // Spans are dealt out so that neighbours, which may all be likely, come to different groups.
    for_each_token(row, Span(row, warp * blocks + part, blocks * ROW_WARPS), [&](float x, int id) {
        greatest = MaxKey()(greatest, token_key(x, id));
        if (x > minus_infinity()) lowest = fminf(lowest, x);
    });
    const int groups = groups_per_block(blocks), lane = threadIdx.x & 31;
    unsigned top = (unsigned)(greatest >> 32);
    for (int offset = 16; offset >= groups; offset /= 2) top = max(top, __shfl_xor_sync(WARP_ALL, top, offset));
    highest[warp][lane] = top;
    greatest = block_reduce<ROW_WARPS>(greatest, (u64)0, keys, MaxKey());
    lowest = block_reduce<ROW_WARPS>(lowest, -minus_infinity(), values, Min());
    if (threadIdx.x == 0) {
        state.greatest[part] = greatest;
        state.lowest[part] = lowest;
        if (part == 0) state.interval = {0, -1, 0, 0, 0, 0}, state.cut = 0, state.num_listed = 0, state.arrived = 0;
    }
    if (threadIdx.x < groups) {  // behind a barrier of block_reduce
        for (int w = warp; w < ROW_WARPS; w += ceil_div(groups, 32)) top = max(top, highest[w][lane]);
        state.highest[part * groups + threadIdx.x] = top;
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
sample_histogram(const float* logits, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps,
                 RowState* states, int width, long long stride, int blocks) {
    __shared__ __align__(8) unsigned bins[3][BINS];
    __shared__ SumsScratch sums_scratch;
    __shared__ SearchScratch scratch;
    __shared__ unsigned threshold;
    __shared__ bool is_last;
    unsigned(&low)[BINS] = bins[0], (&high)[BINS] = bins[1], (&counts)[BINS] = bins[2];
    launch_next();
    for (int i = threadIdx.x; i < BINS; i += ROW_THREADS) counts[i] = low[i] = high[i] = 0;
    wait_for_previous();
    int index = blockIdx.x / blocks, part = blockIdx.x % blocks, warp = threadIdx.x >> 5;
    RowState& state = states[index];
    Row row(logits, index, stride, width);
    Tokens tokens(row, Span(row, part * ROW_WARPS + warp, blocks * ROW_WARPS));
    Request request(index, temperatures, top_ks, top_ps, min_ps);
    if (!request.has_cut()) return;
    const int groups = groups_per_block(blocks) * blocks;
    if (request.is_short(groups)) {
        if (warp == 0) {
            const unsigned found = GroupSearch(state.highest, groups).find(request.top_k);
            if (threadIdx.x == 0) threshold = found;
        }
        __syncthreads();
        const float least = from_ordered(threshold);
        tokens.for_each([&](float x, int id) {
            if (x < least || x != x) return;
            const unsigned place = atomicAdd(&state.num_listed, 1u);
            if (place < ROW_THREADS) state.listed[place] = token_key(x, id);
        });
        return;
    }
    Scale scale = scale_of_row(state, request, blocks);
    if (scale.is_empty()) return;
    __syncthreads();
    tokens.for_each([&](float x, int) {
        if (!scale.has_weight(x)) return;
        int bin = scale.bin(x);
        atomicAdd(&counts[bin], 1u);
        if (request.cuts_by_mass()) add_mass(&low[bin], &high[bin], scale.mass(x));
    });
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += ROW_THREADS) {
        u64 mass = (u64)high[i] << 32 | low[i];
        if (counts[i]) atomicAdd(&state.counts[i], counts[i]);
        if (mass) atomicAdd(&state.masses[i], mass);
    }
    if (!is_last_block(&state.arrived, blocks, &is_last)) return;
    Interval interval = find_interval(state, request, *(Sums*)bins, sums_scratch);
    if (interval.count > CAPACITY) {  // thousands of tokens between two neighbouring cuts: this block searches them all
        u64 cut = cut_of_row(row, scale, request, scratch);
        if (threadIdx.x == 0) state.cut = cut;
    } else if (threadIdx.x == 0) {
        state.interval = interval;
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1)
sample_draw(const float* logits, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps,
            const long long* seeds, const int* positions, RowState* states, int* out, int width, long long stride, int blocks) {
    launch_next();
    wait_for_previous();
    int token = draw(logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, states, width, stride, blocks, [] {});
    if (token >= 0 && threadIdx.x == 0) out[blockIdx.x / blocks] = token;
}
