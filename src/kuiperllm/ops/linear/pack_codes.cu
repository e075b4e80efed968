// Rows of codes as a file has them to rows of planes; see codes.cuh. A thread packs UNIT columns: 32, or 16 of 8 bits.
//
//   BLOCK, BLOCK_BYTES, PLANES, FLIP   the file's layout; see quant/codes.py. PLANES: {offset, bits, run} of each
//   BITS                               of a code
//   SIGNED                             whether 8-bit codes become code - 128
#include "common.cuh"

struct Plane { int offset, bits, run; };

DEVICE unsigned code_at(const unsigned char* block, int column) {
    constexpr Plane planes[] = PLANES;
    unsigned code = 0;
    int done = 0;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(planes) / sizeof(Plane)); i++) {
        const Plane plane = planes[i];
        const int span = plane.run * 8 / plane.bits;
        const unsigned byte = block[plane.offset + column / span * plane.run + column % plane.run];
        code |= (byte >> (column % span / plane.run * plane.bits) & ((1u << plane.bits) - 1)) << done;
        done += plane.bits;
    }
    return code ^ FLIP;
}

// Rows `first` and on of `all` rows.
extern "C" __global__ void __launch_bounds__(256)
pack_codes(const unsigned char* source, unsigned* out, int rows, int width, long long row_bytes, long long first, long long all) {
    launch_next();
    wait_for_previous();
    constexpr int UNIT = BITS == 8 ? 16 : 32;
    const int units = width / UNIT;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x; item < (long long)rows * units; item += step) {
        const long long row = item / units;
        const int column = (int)(item % units) * UNIT;
        unsigned words[UNIT * BITS / 32] = {};
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
            const unsigned char* block = source + row * row_bytes + (column + i) / BLOCK * BLOCK_BYTES;
            unsigned code = code_at(block, (column + i) % BLOCK) ^ (SIGNED ? 0x80u : 0u);
            if (BITS == 8) {
                words[i / 4] |= code << i % 4 * 8;
                continue;
            }
            int word = 0;
#pragma unroll
            for (int plane = 4; plane; plane /= 2) {
                if (!(BITS & plane)) continue;
                words[word + i / (32 / plane)] |= (code & ((1u << plane) - 1)) << (i % (32 / plane) / 2 * plane + i % 2 * 16);
                word += plane, code >>= plane;
            }
        }
        unsigned* to = out;
        int word = 0;
#pragma unroll
        for (int plane = 8; plane; plane /= 2) {
            if (!(BITS & plane)) continue;
            unsigned* at = to + ((first + row) * width + column) / (32 / plane);
#pragma unroll
            for (int i = 0; i < UNIT * plane / 32; i++) at[i] = words[word + i];
            to += all * width / 32 * plane, word += plane;
        }
    }
}
