// Drawing tokens for rows of logits in three launches, in each of which several blocks share a row.
//
//     sample_range      the largest and the lowest logit, and the largest of each of some hundred groups of tokens
//     sample_histogram  how many tokens, and how much weight, lie in each of many bins between the two; the last block finds
//                       the bins in which cuts must be (top-k and top-p each make one)
//     the draw          lists the tokens of these bins and adds up what lies above them; the last block sorts the list, which
//                       gives the exact cut, adds what remains of it, and draws
//
// A row that needs no cut passes through the one in the middle. For a small top-k there is a shorter way: if k groups have a
// token at or above some logit, no token below it remains. The launch in the middle finds the highest such logit, about, and
// lists the tokens that reach it, few more than k; one block of the draw does the rest, each of its threads with a token.
//
// Weights are added as integers, multiples of 2**-40 of the largest one: such sums are exact, so neither the order in which
// threads arrive nor the shape of the grid shows.
#pragma once
#include "cuts.cuh"
#include "random.cuh"

struct DrawScratch {
    SearchScratch search;
    u64 whole;
    int token;
    bool is_last;
};

// The mass with which a token is drawn.
DEVICE u64 mass_to_draw(const Scale& scale, const Request& request, float x) {
    float weight = scale.weight(x);
    return weight < request.min_p ? 0 : scale.as_mass(weight);
}

// Draws from the list that a small top-k leaves, which has a thread for each token.
DEVICE int draw_listed(u64 key, int count, const Scale& scale, const Request& request, u64 fraction, u64* keys, u64* masses,
                       DrawScratch& scratch) {
    const float x = key_logit(key);
    const bool is_listed = threadIdx.x < count && scale.has_weight(x);
    const u64 mass = is_listed ? scale.mass(x) : 0;
    keys[threadIdx.x] = is_listed ? key : 0;
    masses[threadIdx.x] = mass;
    if (threadIdx.x == 0) scratch.token = key_id(scale.greatest);  // where nothing can be drawn
    __syncthreads();
    // Tokens, and their mass, in front of this one in the order of keys.
    int place = 0, last = -1;
    u64 before = 0;
    if (is_listed) {
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const u64 other = keys[i], its_mass = masses[i];
            last += other != 0;
            if (other > key) place++, before += its_mass;
        }
        last = min(last, request.top_k - 1);
        if (place == last) scratch.whole = before + mass;
    }
    __syncthreads();
    const bool remains = is_listed && place <= last && (place == 0 || !request.cuts_by_mass() || before < request.mass_goal(scratch.whole));
    const u64 drawn = remains ? mass_to_draw(scale, request, x) : 0;
    masses[threadIdx.x] = drawn;
    __syncthreads();
    // The mass in front of it in the order of ids.
    if (drawn) {
        u64 whole = before = 0;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const u64 its_mass = masses[i];
            whole += its_mass;
            if (key_id(keys[i]) < key_id(key)) before += its_mass;
        }
        const u64 goal = __umul64hi(fraction, whole) + 1;
        if (before < goal && goal <= before + drawn) scratch.token = key_id(key);
    }
    __syncthreads();
    return scratch.token;
}

// Draws among the tokens of a row whose keys are not below `lowest`; all[i]: the mass of span i. First the span, then the token
// in it, at which the running sum exceeds `fraction` times the whole.
DEVICE int draw_from_spans(const u64* all, u64 lowest, const Row& row, const Scale& scale, const Request& request, int blocks, u64 fraction,
                           SearchScratch& scratch) {
    constexpr int N = SPANS / ROW_THREADS;
    u64 spans[N];
#pragma unroll
    for (int i = 0; i < N; i++) spans[i] = all[threadIdx.x * N + i];
    u64 whole = search(spans, 1, scratch).total;
    u64 goal = __umul64hi(fraction, whole) + 1;
    Crossing crossing = search(spans, goal, scratch);
    if (crossing.item < 0) return key_id(scale.greatest);  // nothing can be drawn
    goal -= crossing.before;
    Span span(row, crossing.item, blocks * ROW_WARPS);
    for (int start = span.begin; start < span.end; start += ROW_THREADS) {
        int vector = start + threadIdx.x, id = row.first_id(vector);
        u64 masses[4] = {};
        if (vector < span.end) {
            float4 v = row.load(vector);
            const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (scale.has_weight(x[i]) && token_key(x[i], id + i) >= lowest) masses[i] = mass_to_draw(scale, request, x[i]);
            }
        }
        crossing = search(masses, goal, scratch);
        if (crossing.item >= 0) return row.first_id(start) + crossing.item;
        goal -= crossing.total;
    }
    return key_id(scale.greatest);
}

constexpr int DRAW_BYTES = (CAPACITY + SPANS) * (int)sizeof(u64);  // of dynamic shared memory

// The token drawn for the row of this block: in the last of the row's blocks to get there, to all of its threads; -1 in the
// others. begin(): called by the blocks that work on the row, when they start.
template <typename Begin>
DEVICE int draw(const float* logits, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps,
                const long long* seeds, const int* positions, RowState* states, int width, long long stride, int blocks, Begin begin) {
    __shared__ DrawScratch own;
    SearchScratch& scratch = own.search;
    u64 *keys = (u64*)shared_memory, *masses_of_spans = keys + CAPACITY;
    int index = blockIdx.x / blocks, part = blockIdx.x % blocks, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    RowState& state = states[index];
    Row row(logits, index, stride, width);
    Tokens tokens(row, Span(row, part * ROW_WARPS + warp, blocks * ROW_WARPS));
    const Interval interval = state.interval;
    u64 cut = state.cut;
    const u64 key = state.listed[threadIdx.x];
    const int listed = state.num_listed;
    const u64 fraction = random_fraction(seeds[index], positions[index]);
    Request request(index, temperatures, top_ks, top_ps, min_ps);
    Scale scale = scale_of_row(state, request, blocks);
    if (request.is_greedy() || scale.is_empty()) {
        if (part > 0) return -1;
        begin();
        return scale.is_empty() ? 0 : key_id(scale.greatest);
    }
    const bool is_short = request.is_short(groups_per_block(blocks) * blocks);
    if (is_short && part > 0) return -1;
    begin();
    auto remains = [&](float x, int id) { return scale.has_weight(x) && token_key(x, id) >= cut; };
    if (is_short) {
        if (listed <= ROW_THREADS) return draw_listed(key, listed, scale, request, fraction, keys, masses_of_spans, own);
        cut = cut_of_row(row, scale, request, scratch);  // many equal tokens: slow
        for (int i = warp; i < SPANS; i += ROW_WARPS) {
            u64 mass = 0;
            if (i < blocks * ROW_WARPS) {
                for_each_token(row, Span(row, i, blocks * ROW_WARPS), [&](float x, int id) {
                    if (remains(x, id)) mass += mass_to_draw(scale, request, x);
                });
            }
            mass = warp_reduce(mass, SumMass());
            if (lane == 0) masses_of_spans[i] = mass;
        }
        __syncthreads();
        return draw_from_spans(masses_of_spans, cut, row, scale, request, blocks, fraction, scratch);
    }

    u64 mass = 0;
    tokens.for_each([&](float x, int id) {
        if (!remains(x, id)) return;
        int bin = interval.is_empty() ? -1 : scale.bin(x);
        if (interval.first <= bin && bin <= interval.last) {
            unsigned place = atomicAdd(&state.num_listed, 1u);
            if (place < CAPACITY) state.listed[place] = token_key(x, id);
        } else if (bin < interval.first) {
            mass += mass_to_draw(scale, request, x);
        }
    });
    mass = warp_reduce(mass, SumMass());
    if (lane == 0) state.spans[part * ROW_WARPS + warp] = mass;
    if (!is_last_block(&state.arrived, blocks, &own.is_last)) return -1;

    for (int i = threadIdx.x; i < SPANS; i += ROW_THREADS) masses_of_spans[i] = i < blocks * ROW_WARPS ? __ldcg(&state.spans[i]) : 0;
    u64 lowest = cut;
    if (!interval.is_empty()) {
        const int kept = sort_list(state, scale, request, keys, scratch);  // which also synchronizes
        const int length = Span(row, 0, blocks * ROW_WARPS).end;
        for (int i = threadIdx.x; i < kept; i += ROW_THREADS)
            atomicAdd(&masses_of_spans[(key_id(keys[i]) + row.skew) / 4 / length], mass_to_draw(scale, request, key_logit(keys[i])));
        lowest = keys[kept - 1];
    }
    __syncthreads();
    return draw_from_spans(masses_of_spans, lowest, row, scale, request, blocks, fraction, scratch);
}
