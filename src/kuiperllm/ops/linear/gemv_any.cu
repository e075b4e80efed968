// Matrix times a few vectors for what the fast kernels do not take: rows that are no whole vectors, odd alignment.
//
// T, W, SCALE, OUT: types of x, of the matrix, of the scales of int8 groups and of the outputs. GROUP: columns that share
// a scale, 0 for none. EPILOGUE, HAS_BIAS: see gemv.cuh.
#include "common.cuh"

enum Epilogue { STORE, ADD, SWIGLU };
using Weight = W;
constexpr int GROUP_COLUMNS = GROUP ? GROUP : 1;  // nothing divides by 0, not even where it is not compiled

DEVICE float weight_at(const float* row, int k) { return row[k]; }
DEVICE float weight_at(const f16* row, int k) { return to_float(row[k]); }
DEVICE float weight_at(const bf16* row, int k) { return to_float(row[k]); }
DEVICE float weight_at(const signed char* row, int k) { return (float)row[k]; }

// A row of the matrix times a row of x, for a warp; every lane gets the result.
DEVICE float product(const T* x, const char* weight, long long row_bytes, const SCALE* scales, const float* bias, long long row, int width) {
    const Weight* values = (const Weight*)(weight + row * row_bytes);
    float sum = 0.f;
    for (int k = threadIdx.x % 32; k < width; k += 32) {
        float w = weight_at(values, k);
        if constexpr (GROUP != 0) w *= to_float(scales[row * (width / GROUP_COLUMNS) + k / GROUP_COLUMNS]);
        sum += w * to_float(x[k]);
    }
    return warp_sum(sum) + (HAS_BIAS ? bias[row] : 0.f);
}

// A warp for each output, blocks of 8 along x; along y, rows of x.
extern "C" __global__ void __launch_bounds__(256) gemv_any(
    const T* x, int x_stride, int width, const char* weight, long long row_bytes, const SCALE* scales, const float* bias,
    OUT* out, int out_stride, int outputs) {
    launch_next();
    wait_for_previous();
    const int output = blockIdx.x * 8 + threadIdx.x / 32;
    if (output >= outputs) return;
    const T* row = x + (long long)blockIdx.y * x_stride;
    float value = product(row, weight, row_bytes, scales, bias, output, width);
    if (EPILOGUE == SWIGLU) value = silu(value) * product(row, weight, row_bytes, scales, bias, (long long)outputs + output, width);
    OUT* to = out + (long long)blockIdx.y * out_stride + output;
    if (threadIdx.x % 32 == 0) *to = from_float<OUT>(EPILOGUE == ADD ? value + to_float(*to) : value);
}
