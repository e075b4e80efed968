// What is known about a row of logits that a token is drawn for, and how its cuts are found; sampling.cuh says when.
#pragma once
#include "ops/logits.cuh"

constexpr int BINS = 2048;
constexpr int CAPACITY = 4096;  // of the list
constexpr int BINS_OF_THREAD = BINS / ROW_THREADS;
constexpr int SPANS = MAX_BLOCKS * ROW_WARPS;
constexpr int LEAST_GROUPS = 256, MAX_GROUPS = 2 * LEAST_GROUPS;
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
    u64 listed[CAPACITY];          // keys, in no order
    unsigned highest[MAX_GROUPS];  // by group: the largest logit, as in `ordered`
    u64 spans[SPANS];              // by span of the row: mass that can be drawn, but for listed tokens
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
    // Whether the tokens that top-k leaves are found by groups: the shorter way.
    DEVICE bool is_short(int groups) const { return cuts_by_count() && top_k <= groups / 2; }
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

// Groups of tokens: how many there are for each block, a power of two.
DEVICE int groups_per_block(int blocks) {
    int groups = 1;
    while (groups * blocks < LEAST_GROUPS) groups *= 2;
    return groups;
}

// A logit, as in `ordered`, at or above which `count` groups have a token, and not many more do; that of minus infinity if
// there are too few. For one warp.
struct GroupSearch {
    static constexpr int N = MAX_GROUPS / 32;
    unsigned highest[N];

    DEVICE GroupSearch(const unsigned* all, int groups) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int group = i * 32 + (threadIdx.x & 31);
            highest[i] = group < groups ? all[group] : 0;
        }
    }
    DEVICE unsigned find(unsigned count) const {
        unsigned low = ORDERED_MINUS_INFINITY, high = 0xffffffffu;  // enough groups reach `low`
        while (high - low > 1) {
            const unsigned middle = low + (high - low) / 2;
            unsigned reach = 0;
#pragma unroll
            for (int i = 0; i < N; i++) reach += highest[i] >= middle;
            reach = __reduce_add_sync(WARP_ALL, reach);
            if (reach < count) high = middle;
            else low = middle;
            if (reach >= count && reach <= count + count / 2) break;
        }
        return low;
    }
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

// Of each bin, its count and its mass with those of all bins above it.
struct Sums {
    u64 mass[BINS];
    unsigned count[BINS];
};
struct SumsScratch {
    u64 masses[ROW_WARPS];
    unsigned counts[ROW_WARPS];
    int of_count, of_mass;  // bins
};

// The cut of top-k lies in the bin in which the count reaches k. That of top-p depends on the mass that top-k leaves,
// which is at least that of the bins above this one: so it lies between the bin that is right for this mass and there.
DEVICE Interval find_interval(const RowState& state, const Request& request, Sums& sums, SumsScratch& scratch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first_bin = threadIdx.x * BINS_OF_THREAD;
    u64 masses[BINS_OF_THREAD];
    unsigned counts[BINS_OF_THREAD];
#pragma unroll
    for (int i = 0; i < BINS_OF_THREAD; i++) {
        counts[i] = __ldcg(&state.counts[first_bin + i]);
        masses[i] = __ldcg(&state.masses[first_bin + i]);
    }
#pragma unroll
    for (int i = 1; i < BINS_OF_THREAD; i++) counts[i] += counts[i - 1], masses[i] += masses[i - 1];
    const unsigned own_count = counts[BINS_OF_THREAD - 1];
    const u64 own_mass = masses[BINS_OF_THREAD - 1];
    unsigned count = own_count;
    u64 mass = own_mass;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const unsigned lower_count = __shfl_up_sync(WARP_ALL, count, offset);
        const u64 lower_mass = __shfl_up_sync(WARP_ALL, mass, offset);
        if (lane >= offset) count += lower_count, mass += lower_mass;
    }
    if (lane == 31) scratch.counts[warp] = count, scratch.masses[warp] = mass;
    if (threadIdx.x == 0) scratch.of_count = -1, scratch.of_mass = 0;
    __syncthreads();
    count -= own_count, mass -= own_mass;
#pragma unroll
    for (int w = 0; w < ROW_WARPS; w++) {
        if (w < warp) count += scratch.counts[w], mass += scratch.masses[w];
    }
#pragma unroll
    for (int i = 0; i < BINS_OF_THREAD; i++) {
        const unsigned before = i ? counts[i - 1] : count, k = request.top_k;
        sums.count[first_bin + i] = counts[i] += count;
        sums.mass[first_bin + i] = masses[i] += mass;
        if (request.cuts_by_count() && before < k && k <= counts[i]) scratch.of_count = first_bin + i;
    }
    __syncthreads();
    Interval interval = {0, scratch.of_count, 0, 0, 0, 0};
    const bool by_count = interval.last >= 0;
    const auto mass_upto = [&](int bin) { return bin < 0 ? 0 : sums.mass[bin]; };
    const auto count_upto = [&](int bin) { return bin < 0 ? 0 : (int)sums.count[bin]; };
    if (by_count) interval.first = interval.last;
    if (request.cuts_by_mass()) {
        const u64 goal = request.mass_goal(mass_upto(by_count ? interval.last - 1 : BINS - 1));
#pragma unroll
        for (int i = 0; i < BINS_OF_THREAD; i++) {
            if ((i ? masses[i - 1] : mass) < goal && goal <= masses[i]) scratch.of_mass = first_bin + i;
        }
        __syncthreads();
        interval.first = scratch.of_mass;
        if (!by_count) interval.last = interval.first;
        interval.mass_above = interval.mass_beside = mass_upto(interval.first - 1);
        if (!by_count) interval.mass_beside += mass_upto(BINS - 1) - mass_upto(interval.last);
    }
    if (interval.is_empty()) return interval;
    interval.count_above = count_upto(interval.first - 1);
    interval.count = count_upto(interval.last) - interval.count_above;
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
