// Makes the weights of a linear layer from the rows of a checkpoint, in which S is the type of the elements.
#include "common.cuh"

// Rows of `width` elements to rows of `stride` elements of type T, zeros behind the last column.
extern "C" __global__ void __launch_bounds__(256)
convert_rows(const S* source, T* out, int rows, int width, int stride) {
    launch_next();
    wait_for_previous();
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= stride) return;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        float value = column < width ? to_float(source[(long long)row * width + column]) : 0.f;
        out[(long long)row * stride + column] = from_float<T>(value);
    }
}

// Groups of neighbours to codes of BITS bits around a middle, a byte each (of 8 bits: the code - 128), with a float16 scale,
// as `quant.rounding.quantize` rounds them; a warp takes a group.
// `failed` becomes 1 if a weight is NaN or infinite, and at least 2 if one is too large for a float16 scale.
extern "C" __global__ void __launch_bounds__(256)
round_groups(const S* source, signed char* codes, f16* scales, int* failed, long long groups, int group) {
    launch_next();
    wait_for_previous();
    constexpr int MIDDLE = 1 << (BITS - 1);
    constexpr float MOST = BITS == 8 ? 127.f : MIDDLE;               // scales that the largest weight is made of at most, ...
    constexpr float MADE_OF = BITS == 8 ? 127.f : -(MIDDLE + .25f);  // and in general
    const float infinity = __uint_as_float(0x7f800000u);
    int lane = threadIdx.x & 31;
    long long step = (long long)gridDim.x * 8;
    for (long long index = (long long)blockIdx.x * 8 + threadIdx.x / 32; index < groups; index += step) {
        const S* weight = source + index * group;
        float high = 0.f, low = 0.f;
        for (int i = lane; i < group; i += 32) {
            float value = to_float(weight[i]);
            if (!(fabsf(value) < infinity)) value = infinity;  // fmaxf would pass over NaN
            high = fmaxf(high, value), low = fminf(low, value);
        }
        high = warp_max(high), low = -warp_max(-low);
        const float largest = fmaxf(high, -low), farthest = BITS == 8 || high >= -low ? largest : -largest;
        const float wanted = __fdiv_rn(farthest, MADE_OF);
        if (lane == 0 && fabsf(wanted) > 65504.f) *failed = largest < infinity ? 2 : 1;
        f16 scale = from_float<f16>(wanted);
        // Below 6e-5 float16 loses digits: the largest weight must not round to more than MOST.
        if (fabsf(to_float(scale)) * (MOST + .5f) < largest) scale.bits++;
        float divisor = to_float(scale) != 0.f ? to_float(scale) : 1.f;
        for (int i = lane; i < group; i += 32) {
            int code = __float2int_rn(__fdiv_rn(to_float(weight[i]), divisor));
            codes[index * group + i] = BITS == 8 ? max(-127, min(code, 127)) : max(-MIDDLE, min(code, MIDDLE - 1)) + MIDDLE;
        }
        if (lane == 0) scales[index] = scale;
    }
}

// Scales (S) and zeros (Z) side by side, as numbers of one type.
DEVICE signed char as(signed char x, signed char) { return x; }
DEVICE float as(float x, float) { return x; }
DEVICE f16 as(f16 x, f16) { return x; }
template <typename V> DEVICE V as(unsigned char x, V) { return from_float<V>((float)x); }

extern "C" __global__ void __launch_bounds__(256)
pair_records(const S* scales, const Z* zeros, S* out, long long count) {
    launch_next();
    wait_for_previous();
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
        out[2 * i] = scales[i], out[2 * i + 1] = as(zeros[i], scales[i]);
}
