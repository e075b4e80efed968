// Drawing tokens for rows of logits in three launches, in each of which several blocks share a row.
//
//     sample_range      the largest and the lowest logit
//     sample_histogram  how many tokens, and how much weight, lie in each of many bins between the two; the last block finds
//                       the bins in which cuts must be (top-k and top-p each make one)
//     the draw          lists the tokens of these bins and adds up what lies above them; the last block sorts the list, which
//                       gives the exact cut, adds what remains of it, and draws
//
// A row that needs no cut passes through the one in the middle. Weights are added as integers, multiples of 2**-40 of
// the largest one: such sums are exact, so neither the order in which threads arrive nor the shape of the grid shows.
#pragma once
#include "ops/logits.cuh"
#include "random.cuh"

constexpr int BINS = 2048;
constexpr int CAPACITY = 4096;  // of the list
constexpr int BINS_OF_THREAD = BINS / ROW_THREADS;
constexpr int SPANS = MAX_BLOCKS * ROW_WARPS;
constexpr float LOWEST_EXPONENT = -87.3f;  // e to less than this is no normal float32; such tokens are never drawn
constexpr float MASS_OF_ONE = 1099511627776.f;

// The bins among whose tokens the cuts must be, and what is known about the tokens.
struct Interval {
    int first, last;         // no bins: no cut
    int count, count_above;  // tokens in these bins, and in those above them
    u64 mass_above;          // of the latter
    u64 mass_beside;         // of all tokens that top-k leaves, but for those of the interval

    DEVICE bool is_empty() const { return last < first; }
};

// What the launches for one row tell each other.
struct RowState {
    u64 greatest[MAX_BLOCKS];  // by block: key of the most likely token
    float lowest[MAX_BLOCKS];  // by block: least logit above minus infinity
    unsigned counts[BINS];
    u64 masses[BINS];
    u64 listed[CAPACITY];  // keys, in no order
    u64 spans[SPANS];      // by span of the row: mass that can be drawn, but for listed tokens
    u64 cut;               // the lowest key that remains, where the list does not tell
    Interval interval;
    unsigned num_listed;
    unsigned arrived;      // blocks of the present launch
};
static_assert(sizeof(RowState) == STATE_BYTES, "the launcher reserves STATE_BYTES a row");

// What is wanted of a row.
struct Request {
    float temperature, top_p, min_p;
    int top_k;

    DEVICE Request(int row, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps)
        : temperature(temperatures[row]), top_p(top_ps[row]), min_p(min_ps[row]), top_k(top_ks[row]) {}

    DEVICE bool is_greedy() const { return !(temperature > 0.f); }
    DEVICE bool cuts_by_count() const { return top_k > 0; }
    DEVICE bool cuts_by_mass() const { return top_p < 1.f; }
    DEVICE bool has_cut() const { return !is_greedy() && (cuts_by_count() || cuts_by_mass()); }

    // Of tokens with this mass, the least that must remain; at least 1, which only the most likely one has for sure.
    DEVICE u64 mass_goal(u64 mass) const {
        double goal = (double)top_p * (double)mass;
        u64 whole = goal > 1. ? (u64)goal : 1;
        return (double)whole < goal ? whole + 1 : whole;
    }
};

// The weights of a row, e**((logit - largest) / temperature), and the bins that its logits fall into.
struct Scale {
    u64 greatest;
    float best, lowest, inverse_temperature, bins_per_unit;

    DEVICE bool is_empty() const { return !is_possible(greatest); }

    // A token of weight 0 is never drawn and counts for nothing.
    DEVICE bool has_weight(float x) const { return x == best || (x - best) * inverse_temperature >= LOWEST_EXPONENT; }
    DEVICE float weight(float x) const {
        if (x == best) return 1.f;
        float exponent = (x - best) * inverse_temperature;
        return exponent >= LOWEST_EXPONENT ? expf(exponent) : 0.f;
    }
    DEVICE u64 mass(float x) const { return as_mass(weight(x)); }
    DEVICE static u64 as_mass(float weight) { return (u64)(weight * MASS_OF_ONE + 0.5f); }

    // For tokens that have weight; the larger the logit, the lower the bin.
    DEVICE int bin(float x) const { return x == best ? 0 : (int)fminf((best - x) * bins_per_unit, BINS - 1); }
};

// Combines what `sample_range` found. Every warp does it for itself.
DEVICE Scale scale_of_row(const RowState& state, const Request& request, int blocks) {
    u64 greatest = 0;
    float lowest = -minus_infinity();
    for (int i = threadIdx.x & 31; i < blocks; i += 32) {
        greatest = MaxKey()(greatest, state.greatest[i]);
        lowest = fminf(lowest, state.lowest[i]);
    }
    greatest = warp_reduce(greatest, MaxKey());
    lowest = warp_reduce(lowest, Min());
    float best = key_logit(greatest);
    float range = fminf(best - lowest, -LOWEST_EXPONENT * request.temperature);
    return {greatest, best, lowest, 1.f / request.temperature, BINS / range};
}

// A 64-bit sum in shared memory, where atomic additions have 32 bits: the sum is the same in any order.
DEVICE void add_mass(unsigned* low, unsigned* high, u64 mass) {
    if (mass == 0) return;
    unsigned lower = (unsigned)mass, upper = (unsigned)(mass >> 32);
    upper += atomicAdd(low, lower) > 0xffffffffu - lower;
    if (upper) atomicAdd(high, upper);
}

// --- cuts -----------------------------------------------------------------------------------------------------------

// The cut of top-k lies in the bin in which the count reaches k. That of top-p depends on the mass that top-k leaves,
// which is at least that of the bins above this one: so it lies between the bin that is right for this mass and there.
DEVICE Interval find_interval(const RowState& state, const Request& request, SearchScratch& scratch) {
    u64 counts[BINS_OF_THREAD], masses[BINS_OF_THREAD], part[BINS_OF_THREAD];
    int first_bin = threadIdx.x * BINS_OF_THREAD;
#pragma unroll
    for (int i = 0; i < BINS_OF_THREAD; i++) {
        counts[i] = __ldcg(&state.counts[first_bin + i]);
        masses[i] = __ldcg(&state.masses[first_bin + i]);
    }
    Interval interval = {0, -1, 0, 0, 0, 0};
    if (request.cuts_by_count()) interval.last = search(counts, (u64)request.top_k, scratch).item;
    bool by_count = interval.last >= 0;
    if (!by_count && !request.cuts_by_mass()) return interval;

    auto sum = [&](const u64(&amount)[BINS_OF_THREAD], int begin, int end) {
#pragma unroll
        for (int i = 0; i < BINS_OF_THREAD; i++)
            part[i] = begin <= first_bin + i && first_bin + i < end ? amount[i] : 0;
        return search(part, 1, scratch).total;
    };
    interval.first = interval.last;
    if (request.cuts_by_mass()) {
        u64 least = sum(masses, 0, by_count ? interval.last : BINS);
        interval.first = max(search(masses, request.mass_goal(least), scratch).item, 0);
        if (!by_count) interval.last = interval.first;
        interval.mass_above = interval.mass_beside = sum(masses, 0, interval.first);
        if (!by_count) interval.mass_beside += sum(masses, interval.last + 1, BINS);
    }
    interval.count_above = (int)sum(counts, 0, interval.first);
    interval.count = (int)sum(counts, interval.first, interval.last + 1);
    return interval;
}

// The largest key at or above which the tokens' amounts add up to `goal`, found bit by bit. For a block; slow.
template <typename Amount>
DEVICE u64 search_row(const Row& row, const Scale& scale, u64 goal, SearchScratch& scratch, Amount amount) {
    // Logits agree in the bits in which the greatest agrees with the lowest, ids in those that none needs.
    int logit_bits = 32 - __clz(ordered(scale.best) ^ ordered(scale.lowest)), id_bits = 32 - __clz(row.size - 1);
    u64 found = 0;
    for (int bit = 63; bit >= 0; bit--) {
        if (bit % 32 >= (bit < 32 ? id_bits : logit_bits)) {
            found |= scale.greatest & (u64)1 << bit;
            continue;
        }
        u64 trial = found | (u64)1 << bit;
        u64 sum[1] = {0};
        for_each_token(row, Span(row, threadIdx.x >> 5, ROW_WARPS), [&](float x, int id) {
            if (token_key(x, id) >= trial) sum[0] += amount(x);
        });
        if (search(sum, 1, scratch).total >= goal) found = trial;
    }
    return found;
}

// The lowest key that remains, from the logits alone.
DEVICE u64 cut_of_row(const Row& row, const Scale& scale, const Request& request, SearchScratch& scratch) {
    auto count = [&](float x) { return (u64)scale.has_weight(x); };
    auto mass = [&](float x) { return scale.mass(x); };
    u64 cut = request.cuts_by_count() ? search_row(row, scale, request.top_k, scratch, count) : 0;
    if (!request.cuts_by_mass()) return cut;
    u64 whole[1] = {0};
    for_each_token(row, Span(row, threadIdx.x >> 5, ROW_WARPS), [&](float x, int id) {
        if (token_key(x, id) >= cut) whole[0] += mass(x);
    });
    return search_row(row, scale, request.mass_goal(search(whole, 1, scratch).total), scratch, mass);
}

// How many of the listed tokens remain; their keys are left in order.
DEVICE int sort_list(const RowState& state, const Scale& scale, const Request& request, u64* keys, SearchScratch& scratch) {
    constexpr int N = CAPACITY / ROW_THREADS;
    int count = min(__ldcg(&state.num_listed), (unsigned)CAPACITY), rounded = 1;
    while (rounded < count) rounded *= 2;
    for (int i = threadIdx.x; i < rounded; i += ROW_THREADS) keys[i] = i < count ? __ldcg(&state.listed[i]) : 0;
    sort_descending(keys, rounded);
    int kept = count;
    if (request.cuts_by_count()) kept = max(1, min(kept, request.top_k - state.interval.count_above));
    if (!request.cuts_by_mass()) return kept;
    u64 masses[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        int place = threadIdx.x * N + i;
        masses[i] = place < kept ? scale.mass(key_logit(keys[place])) : 0;
    }
    u64 whole = state.interval.mass_beside + search(masses, 1, scratch).total;
    return max(search(masses, request.mass_goal(whole) - state.interval.mass_above, scratch).item, 0) + 1;
}

// --- the draw -------------------------------------------------------------------------------------------------------

constexpr int DRAW_BYTES = (CAPACITY + SPANS) * (int)sizeof(u64);  // of dynamic shared memory

// The token drawn for the row of this block: in the last of the row's blocks to get there, to all of its threads; -1 in the
// others. begin(): called by the blocks that work on the row, when they start.
template <typename Begin>
DEVICE int draw(const float* logits, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps,
                const long long* seeds, const int* positions, RowState* states, int width, long long stride, int blocks, Begin begin) {
    __shared__ SearchScratch scratch;
    __shared__ bool is_last;
    u64 *keys = (u64*)shared_memory, *masses_of_spans = keys + CAPACITY;
    int index = blockIdx.x / blocks, part = blockIdx.x % blocks, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    RowState& state = states[index];
    Row row(logits, index, stride, width);
    Tokens tokens(row, Span(row, part * ROW_WARPS + warp, blocks * ROW_WARPS));
    const Interval interval = state.interval;
    const u64 cut = state.cut;
    Request request(index, temperatures, top_ks, top_ps, min_ps);
    Scale scale = scale_of_row(state, request, blocks);
    if (request.is_greedy() || scale.is_empty()) {
        if (part > 0) return -1;
        begin();
        return scale.is_empty() ? 0 : key_id(scale.greatest);
    }
    begin();
    auto mass_to_draw = [&](float x) -> u64 {
        float weight = scale.weight(x);
        return weight < request.min_p ? 0 : scale.as_mass(weight);
    };
    auto remains = [&](float x, int id) { return scale.has_weight(x) && token_key(x, id) >= cut; };

    u64 mass = 0;
    tokens.for_each([&](float x, int id) {
        if (!remains(x, id)) return;
        int bin = interval.is_empty() ? -1 : scale.bin(x);
        if (interval.first <= bin && bin <= interval.last) {
            unsigned place = atomicAdd(&state.num_listed, 1u);
            if (place < CAPACITY) state.listed[place] = token_key(x, id);
        } else if (bin < interval.first) {
            mass += mass_to_draw(x);
        }
    });
    mass = warp_reduce(mass, SumMass());
    if (lane == 0) state.spans[part * ROW_WARPS + warp] = mass;
    if (!is_last_block(&state.arrived, blocks, &is_last)) return -1;

    // First the span, then the token in it, at which the running sum exceeds u times the whole.
    for (int i = threadIdx.x; i < SPANS; i += ROW_THREADS) masses_of_spans[i] = i < blocks * ROW_WARPS ? __ldcg(&state.spans[i]) : 0;
    u64 lowest = cut;
    if (!interval.is_empty()) {
        const int kept = sort_list(state, scale, request, keys, scratch);  // which also synchronizes
        const int length = Span(row, 0, blocks * ROW_WARPS).end;
        for (int i = threadIdx.x; i < kept; i += ROW_THREADS)
            atomicAdd(&masses_of_spans[(key_id(keys[i]) + row.skew) / 4 / length], mass_to_draw(key_logit(keys[i])));
        lowest = keys[kept - 1];
    }
    __syncthreads();
    constexpr int N = SPANS / ROW_THREADS;
    u64 spans[N];
#pragma unroll
    for (int i = 0; i < N; i++) spans[i] = masses_of_spans[threadIdx.x * N + i];
    u64 whole = search(spans, 1, scratch).total;
    u64 goal = __umul64hi(random_fraction(seeds[index], positions[index]), whole) + 1;
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
                if (scale.has_weight(x[i]) && token_key(x[i], id + i) >= lowest) masses[i] = mass_to_draw(x[i]);
            }
        }
        crossing = search(masses, goal, scratch);
        if (crossing.item >= 0) return row.first_id(start) + crossing.item;
        goal -= crossing.total;
    }
    return key_id(scale.greatest);
}
