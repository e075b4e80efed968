// The largest logit of each row, in one launch: blocks reduce parts of rows, and the last one to finish combines.
#pragma once
#include "ops/logits.cuh"

__device__ unsigned arrived;  // blocks of the present launch; launches of one device follow one another

// Calls use(row, token) once for every row, in one block, by one thread each. Other blocks return false.
// Blocks 0 to `blocks` - 1 share row 0, the next ones row 1, and so on.
template <typename Use>
DEVICE bool argmax_of_rows(const float* logits, u64* winners, int rows, int width, long long stride, int blocks, Use use) {
    __shared__ u64 scratch[ROW_WARPS];
    __shared__ bool is_last;
    int part = blockIdx.x % blocks, warp = threadIdx.x >> 5;
    Row row(logits, blockIdx.x / blocks, stride, width);
    u64 best = 0;
    for_each_token(row, Span(row, part * ROW_WARPS + warp, blocks * ROW_WARPS), [&](float x, int id) {
        best = MaxKey()(best, token_key(x, id));
    });
    best = block_reduce<ROW_WARPS>(best, (u64)0, scratch, MaxKey());
    if (threadIdx.x == 0) winners[blockIdx.x] = best;
    if (!is_last_block(&arrived, gridDim.x, &is_last)) return false;

    // As many lanes for a row as it has blocks, up to a warp, rounded up to a power of two.
    int lanes = 1;
    while (lanes < min(blocks, 32)) lanes *= 2;
    int lane = threadIdx.x % lanes, at_once = ROW_THREADS / lanes;
    for (int first = 0; first < rows; first += at_once) {
        int r = first + threadIdx.x / lanes;
        best = 0;
        for (int i = lane; i < blocks && r < rows; i += lanes) best = MaxKey()(best, winners[r * blocks + i]);
        for (int offset = lanes / 2; offset; offset /= 2)
            best = MaxKey()(best, __shfl_xor_sync(WARP_ALL, best, offset));
        if (lane == 0 && r < rows) use(r, key_id(best));
    }
    return true;
}
