// CUDA kernels of `logprobs`: blocks sort chunks of rows and add up their weights, then one block a row merges.
#include "ops/logits.cuh"

constexpr int CHUNK = 4 * ROW_THREADS;  // elements of a block: a vector for each thread

// The maximum m of a chunk, and its sum of e**(x - m).
struct Part { float best, sum; };

// The first `kept` keys of each chunk in descending order to lists [row][chunk][kept], and its part.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
logprobs_chunks(const float* logits, u64* lists, Part* parts, int width, long long stride, int chunks, int kept) {
    __shared__ u64 keys[CHUNK];
    __shared__ float scratch[2][ROW_WARPS];
    launch_next();
    wait_for_previous();
    Row row(logits, blockIdx.x / chunks, stride, width);
    int vector = blockIdx.x % chunks * ROW_THREADS + threadIdx.x, id = row.first_id(vector);
    float4 v = row.load(vector);
    float x[4] = {v.x, v.y, v.z, v.w}, best = minus_infinity(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (id + i < 0 || id + i >= width) x[i] = minus_infinity();
        best = fmaxf(best, x[i]);
    }
    best = block_reduce<ROW_WARPS>(best, minus_infinity(), scratch[0], Max());
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (x[i] != minus_infinity()) sum += expf(x[i] - best);  // NaN passes
    }
    sum = block_reduce<ROW_WARPS>(sum, 0.f, scratch[1], Sum());
    if (threadIdx.x == 0) parts[blockIdx.x] = {best, sum};
    if (kept == 0) return;
#pragma unroll
    for (int i = 0; i < 4; i++) keys[4 * threadIdx.x + i] = token_key(x[i], id + i);
    sort_descending(keys, CHUNK);
    for (int i = threadIdx.x; i < kept; i += ROW_THREADS) lists[(long long)blockIdx.x * kept + i] = keys[i];
}

// log(sum of e**x) of a row; for all threads.
DEVICE double log_of_sum(const Part* parts, int chunks, float (&scratch)[2][ROW_WARPS]) {
    float best = minus_infinity(), sum = 0.f;
    for (int i = threadIdx.x; i < chunks; i += ROW_THREADS) best = fmaxf(best, parts[i].best);
    best = block_reduce<ROW_WARPS>(best, minus_infinity(), scratch[0], Max());
    for (int i = threadIdx.x; i < chunks; i += ROW_THREADS) sum += parts[i].sum * expf(parts[i].best - best);
    sum = block_reduce<ROW_WARPS>(sum, 0.f, scratch[1], Sum());
    return best + log((double)sum);
}

// One block a row: the logarithms, and the k greatest of the heads of its lists, one after the other.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
logprobs_merge(const float* logits, const int* token_ids, const u64* lists, const Part* parts, float* chosen, int* top_ids,
               float* top_values, int width, long long stride, int chunks, int kept, int k) {
    __shared__ float scratch[2][ROW_WARPS];
    __shared__ u64 winners[2][ROW_WARPS];
    launch_next();
    wait_for_previous();
    int row = blockIdx.x;
    double whole = log_of_sum(parts + (long long)row * chunks, chunks, scratch);
    if (threadIdx.x == 0) {
        int token = token_ids[row];
        bool is_inside = token >= 0 && token < width;
        chosen[row] = is_inside ? (float)(logits[row * stride + token] - whole) : minus_infinity();
    }

    int* taken = (int*)shared_memory;  // of each list
    lists += (long long)row * chunks * kept;
    auto head = [&](int list) { return taken[list] < kept ? lists[(long long)list * kept + taken[list]] : 0; };
    u64 own = 0;  // the greatest head of this thread's lists
    for (int list = threadIdx.x; k > 0 && list < chunks; list += ROW_THREADS) {
        taken[list] = 0;
        own = MaxKey()(own, head(list));
    }
    for (int place = 0; place < k; place++) {
        u64 winner = block_reduce<ROW_WARPS>(own, (u64)0, winners[place % 2], MaxKey());
        if (threadIdx.x == 0) {
            float value = is_possible(winner) ? key_logit(winner) : minus_infinity();
            top_ids[(long long)row * k + place] = is_possible(winner) ? key_id(winner) : -1;
            top_values[(long long)row * k + place] = (float)(value - whole);
        }
        if (own != winner || winner == 0) continue;
        own = 0;
        for (int list = threadIdx.x; list < chunks; list += ROW_THREADS) {
            if (head(list) == winner) taken[list]++;
            own = MaxKey()(own, head(list));
        }
    }
}
