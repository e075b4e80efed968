// Keys and values of new tokens to their places in the cache. LANES lanes move one head of one token.
//
// T: type of activations; C: type of the cache; D: elements of a head; BLOCK: tokens in a block of the cache.
#include "head.cuh"

extern "C" __global__ void __launch_bounds__(128)
write_kv(const T* k, const T* v, const long long* slots, C* keys, C* values, int tokens, int num_kv_heads,
         long long k_token, long long k_head, long long v_token, long long v_head) {
    launch_next();
    wait_for_previous();
    long long item = ((long long)blockIdx.x * 128 + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    if (item >= (long long)tokens * num_kv_heads) return;
    int token = (int)(item / num_kv_heads), head = (int)(item % num_kv_heads);
    long long slot = slots[token];
    if (slot < 0) return;
    long long to = slot_row(slot, head, num_kv_heads);
    float x[2 * PAIRS];
    load_row(k + token * k_token + head * k_head, lane, x);
    store_row(keys + to, lane, x);
    load_row(v + token * v_token + head * v_head, lane, x);
    store_row(values + to, lane, x);
}
