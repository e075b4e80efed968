// Queries, keys and values of new tokens, side by side in rows of qkv: normalizes (if there are norms) and rotates the heads of
// queries in place and those of keys on their way to the cache, and copies values there. LANES lanes take a head of a token.
//
// T, C, D, BLOCK: as in head.cuh.
#include "ops/attention/head.cuh"

extern "C" __global__ void __launch_bounds__(128)
rope_write(T* qkv, C* keys, C* values, const int* positions, const long long* slots, const float* cos_sin,
           const float* q_norm, const float* k_norm, int tokens, int num_heads, int num_kv_heads, int num_positions,
           long long qkv_row, long long cos_sin_row, float eps) {
    launch_next();
    wait_for_previous();
    int all_heads = num_heads + 2 * num_kv_heads, lane = threadIdx.x % LANES;
    long long item = ((long long)blockIdx.x * 128 + threadIdx.x) / LANES;
    bool exists = item < (long long)tokens * all_heads;  // every lane takes part in the sums of norms
    int token = exists ? (int)(item / all_heads) : 0, head = exists ? (int)(item % all_heads) : 0;
    bool is_query = head < num_heads, is_value = head >= num_heads + num_kv_heads;
    T* own = qkv + token * qkv_row + (long long)head * D;
    float x[2 * PAIRS];
    load_row(own, lane, x);
    if (q_norm) {
        float weight[2 * PAIRS], normal[2 * PAIRS];
        load_row(is_query ? q_norm : k_norm, lane, weight);
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i++) normal[i] = x[i];
        normalize_row(normal, weight, eps);
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i++) x[i] = is_value ? x[i] : normal[i];
    }
    if (!exists) return;
    if (!is_value) {
        float turn[2 * PAIRS];
        int position = min(max(positions[token], 0), num_positions - 1);
        load_row(cos_sin + position * cos_sin_row, lane, turn);
        rotate_row(x, turn);
    }
    if (is_query) {
        store_row(own, lane, x);
        return;
    }
    long long slot = slots[token];
    if (slot < 0) return;
    int kv_head = (head - num_heads) % num_kv_heads;
    store_row((is_value ? values : keys) + slot_row(slot, kv_head, num_kv_heads), lane, x);
}
