// Copies between strided views.
#include "common.cuh"

// Element i of a view is found by taking i apart along four axes, the last one fastest. Strides count elements.
// ELEMENT is an unsigned integer as wide as the tensors' type.
extern "C" __global__ void __launch_bounds__(256)
copy_strided(ELEMENT* dst, const ELEMENT* src,
             long long count, long long size1, long long size2, long long size3,
             long long dst_stride0, long long dst_stride1, long long dst_stride2, long long dst_stride3,
             long long src_stride0, long long src_stride1, long long src_stride2, long long src_stride3) {
    launch_next();
    wait_for_previous();
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        long long rest = i;
        long long i3 = rest % size3;
        rest /= size3;
        long long i2 = rest % size2;
        rest /= size2;
        long long i1 = rest % size1;
        long long i0 = rest / size1;
        dst[i0 * dst_stride0 + i1 * dst_stride1 + i2 * dst_stride2 + i3 * dst_stride3] =
            src[i0 * src_stride0 + i1 * src_stride1 + i2 * src_stride2 + i3 * src_stride3];
    }
}
