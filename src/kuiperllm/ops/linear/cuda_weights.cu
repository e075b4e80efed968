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

// Groups of neighbours to int8 with a float16 scale, as `quant.q8.quantize_q8` rounds them; a warp takes a group.
// `failed` becomes 1 if a weight is NaN or infinite, and at least 2 if one is too large for a float16 scale.
extern "C" __global__ void __launch_bounds__(256)
quantize_groups(const S* source, signed char* values, f16* scales, int* failed, long long groups, int group) {
    launch_next();
    wait_for_previous();
    const float infinity = __uint_as_float(0x7f800000u);
    int lane = threadIdx.x & 31;
    long long step = (long long)gridDim.x * 8;
    for (long long index = (long long)blockIdx.x * 8 + threadIdx.x / 32; index < groups; index += step) {
        const S* weight = source + index * group;
        float largest = 0.f;
        for (int i = lane; i < group; i += 32) {
            float size = fabsf(to_float(weight[i]));
            largest = size < infinity ? fmaxf(largest, size) : infinity;  // fmaxf would pass over NaN
        }
        largest = warp_max(largest);
        if (lane == 0 && largest > 127.f * 65504.f) *failed = largest < infinity ? 2 : 1;
        f16 scale = from_float<f16>(__fdiv_rn(largest, 127.f));
        // Below 6e-5 float16 loses digits: the largest weight must not round to more than 127.
        if (to_float(scale) * 127.5f < largest) scale.bits++;
        float divisor = to_float(scale) > 0.f ? to_float(scale) : 1.f;
        for (int i = lane; i < group; i += 32)
            values[index * group + i] = (signed char)__float2int_rn(__fdiv_rn(to_float(weight[i]), divisor));
        if (lane == 0) scales[index] = scale;
    }
}
