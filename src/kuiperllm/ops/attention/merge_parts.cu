// Puts together what blocks have seen of the parts of a context. A warp takes a head of a token.
//
// T: type of activations; D: elements of a head.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128)
merge_parts(const T* partial, const float2* stats, T* out, int tokens, int num_heads, int parts, long long out_token,
            long long out_head) {
    launch_next();
    wait_for_previous();
    long long item = (long long)blockIdx.x * 4 + threadIdx.x / 32;
    int lane = threadIdx.x & 31;
    if (item >= (long long)tokens * num_heads) return;
    int token = (int)(item / num_heads), head = (int)(item % num_heads);
    const float2* seen = stats + (long long)token * parts * num_heads + head;
    float top = -1e30f, sum = 0.f;
    for (int part = lane; part < parts; part += 32) top = fmaxf(top, seen[(long long)part * num_heads].x);
    top = warp_max(top);
    for (int part = lane; part < parts; part += 32) {
        float2 own = seen[(long long)part * num_heads];
        sum += own.y * exp2_approx(own.x - top);
    }
    sum = warp_sum(sum);
    float inverse = sum > 0.f ? 1.f / sum : 0.f;
    const T* row = partial + ((long long)token * parts * num_heads + head) * D;
    for (int first = 0; first < D; first += 64) {  // two elements a lane, rows of 128 bytes or more at once
        int element = first + 2 * lane;
        float a = 0.f, b = 0.f;
        if (element < D) {
#pragma unroll 4
            for (int part = 0; part < parts; part++) {
                float2 own = seen[(long long)part * num_heads];
                float weight = own.y * exp2_approx(own.x - top) * inverse;
                const T* piece = row + (long long)part * num_heads * D + element;
                a += weight * to_float(piece[0]);
                b += weight * to_float(piece[1]);
            }
            T* to = out + token * out_token + head * out_head + element;
            to[0] = from_float<T>(a);
            to[1] = from_float<T>(b);
        }
    }
}
