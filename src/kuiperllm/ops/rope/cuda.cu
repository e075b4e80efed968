// Rotary embedding in place. A thread turns PAIRS pairs of a head.
//
// T: type of the heads; INTERLEAVED: pairs are (2i, 2i + 1), otherwise (i, i + half). PAIRS is 1, or as many as let
// a thread load vectors of 16 bytes: one if pairs are interleaved, else one from each half of the head.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(128)
rope(T* x, const int* positions, const float* cos_sin, int tokens, int heads, int half, int num_positions,
     long long token_stride, long long head_stride, long long position_stride) {
    launch_next();
    wait_for_previous();
    int units = half / PAIRS, index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= heads * units) return;
    int head = index / units, first = index % units * PAIRS;
    for (int token = blockIdx.y; token < tokens; token += gridDim.y) {
        int position = min(max(positions[token], 0), num_positions - 1);
        const float* angles = cos_sin + position * position_stride + first;
        float cosine[PAIRS], sine[PAIRS];
        load(angles, cosine);
        load(angles + half, sine);
        T* of_head = x + token * token_stride + head * head_stride;
        if constexpr (INTERLEAVED) {
            float pairs[2 * PAIRS];
            load(of_head + 2 * first, pairs);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                float a = pairs[2 * i], b = pairs[2 * i + 1];
                pairs[2 * i] = a * cosine[i] - b * sine[i];
                pairs[2 * i + 1] = a * sine[i] + b * cosine[i];
            }
            store(of_head + 2 * first, pairs);
        } else {
            float a[PAIRS], b[PAIRS], turned[PAIRS];
            load(of_head + first, a);
            load(of_head + first + half, b);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                turned[i] = a[i] * cosine[i] - b[i] * sine[i];
                b[i] = a[i] * sine[i] + b[i] * cosine[i];
            }
            store(of_head + first, turned);
            store(of_head + first + half, b);
        }
    }
}
