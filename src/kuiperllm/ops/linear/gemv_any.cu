// Matrix times a few vectors for what the fast kernels do not take: rows that are no whole vectors, odd alignment, codes beside
// float32.
//
// T, W, OUT: types of x, of the matrix and of the outputs. BITS, CODING, SCALE, GROUP: of the scheme, if the matrix is
// quantized; BITS is 0 if not. EPILOGUE, HAS_BIAS: see gemv.cuh.
#include "common.cuh"
#include "codes.cuh"

enum Epilogue { STORE, ADD, SWIGLU };
constexpr int GROUP_COLUMNS = GROUP ? GROUP : 1;  // nothing divides by 0, not even where it is not compiled

struct Matrix {
    const unsigned char* data;
    const SCALE* scales;
    const f16* super_scales;
    const float* bias;
    long long row_bytes, rows;  // row_bytes: of rows that are not quantized
    int width;

    template <int bits> DEVICE float element(long long row, int k) const {
        if constexpr (bits == 0) {
            return to_float(((const W*)(data + row * row_bytes))[k]);
        } else {
            const long long index = row * (width / GROUP_COLUMNS) + k / GROUP_COLUMNS, block = row * (width / 256) + k / 256;
            const Group group = load_group<bits, CODING>(scales, index, super_scales, block);
            return group.factor * centred_code<bits, CODING>(data, rows, width, row, k) + group.offset;
        }
    }

    // A row times a row of x, for a warp; every lane gets the result.
    DEVICE float product(const T* x, long long row) const {
        float sum = 0.f;
        for (int k = threadIdx.x % 32; k < width; k += 32) sum += element<BITS>(row, k) * to_float(x[k]);
        return warp_sum(sum) + (HAS_BIAS ? bias[row] : 0.f);
    }
};

// A warp for each output, blocks of 8 along x; along y, rows of x. `rows`: of the matrix.
extern "C" __global__ void __launch_bounds__(256) gemv_any(
    const T* x, int x_stride, int width, const unsigned char* data, long long row_bytes, const SCALE* scales, const f16* super_scales,
    const float* bias, OUT* out, int out_stride, int outputs, int rows) {
    launch_next();
    wait_for_previous();
    const int output = blockIdx.x * 8 + threadIdx.x / 32;
    if (output >= outputs) return;
    const Matrix matrix = {data, scales, super_scales, bias, row_bytes, rows, width};
    const T* row = x + (long long)blockIdx.y * x_stride;
    float value = matrix.product(row, output);
    if (EPILOGUE == SWIGLU) value = silu(value) * matrix.product(row, (long long)outputs + output);
    OUT* to = out + (long long)blockIdx.y * out_stride + output;
    if (threadIdx.x % 32 == 0) *to = from_float<OUT>(EPILOGUE == ADD ? value + to_float(*to) : value);
}
