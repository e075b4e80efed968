// What common.cuh and mma.cuh do with instructions of their own, for a processor: the same functions, by the PTX ISA.
// Placed where those headers leave their own versions out.

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
DEVICE float to_float(f16 x) {
    unsigned sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Scaling by 2^112 turns a float with the bits of a half into its value, subnormal or not.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 5192296858534827628530496329220096.f));
}

template <typename Element> DEVICE Element from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE bf16 from_float<bf16>(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the one NaN that cvt makes
    return {(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <> DEVICE f16 from_float<f16>(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {0x7fff};
    if (magnitude >= 0x47800000u) return {(unsigned short)(sign | 0x7c00u)};  // 65536 and up
    if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves multiples of 2^-24, rounded, in the lowest bits
        return {(unsigned short)(sign | (__float_as_uint(__uint_as_float(magnitude) + .5f) - 0x3f000000u))};
    return {(unsigned short)(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13)};
}

template <typename Element> DEVICE unsigned pack2(float low, float high) {
    return from_float<Element>(low).bits | (unsigned)from_float<Element>(high).bits << 16;
}
template <typename Element> DEVICE float2 unpack2(unsigned pair) {
    return make_float2(to_float(Element{(unsigned short)pair}), to_float(Element{(unsigned short)(pair >> 16)}));
}

// The float holds the product exactly, and the sum to more bits than twice the element's: rounding twice does no harm
// but where the sum lies halfway between two elements to within a float's precision.
template <typename Element> DEVICE unsigned fma2(unsigned a, unsigned b, unsigned c) {
    float2 x = unpack2<Element>(a), y = unpack2<Element>(b), z = unpack2<Element>(c);
    return pack2<Element>(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
}

DEVICE unsigned and_or(unsigned a, unsigned mask, unsigned bits) { return (a & mask) | bits; }
DEVICE unsigned and_xor(unsigned a, unsigned mask, unsigned bits) { return (a & mask) ^ bits; }

DEVICE int in_register(int x) { return x; }
DEVICE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

DEVICE void launch_next() {}
DEVICE void wait_for_previous(emulated::Place place = emulated::Place::here()) { emulated::wait_for_previous(place); }

using SharedAddress = char*;
DEVICE SharedAddress shared_address(const void* p) { return (char*)p; }
DEVICE void copy_async(void* shared, const void* global, emulated::Place place = emulated::Place::here()) {
    emulated::copy_async(shared, global, 16, 16, place);
}
DEVICE void copy_async_or_zero(void* shared, const void* global, bool valid, emulated::Place place = emulated::Place::here()) {
    emulated::copy_async(shared, global, 16, valid ? 16 : 0, place);
}
DEVICE void copy_async_word(void* shared, const void* global, int bytes, emulated::Place place = emulated::Place::here()) {
    emulated::copy_async(shared, global, 4, bytes, place);
}
DEVICE void copy_async_eight(void* shared, const void* global, int bytes, emulated::Place place = emulated::Place::here()) {
    emulated::copy_async(shared, global, 8, bytes, place);
}
DEVICE void commit_copies() { emulated::commit_copies(); }
template <int LEFT_> DEVICE void wait_for_copies() { emulated::wait_for_copies(LEFT_); }

namespace twins {

using emulated::collective;
using emulated::fail;

struct Matrices {
    const void* row;
    unsigned* registers;
};

// ldmatrix .m8n8.x4.b16: matrix i has its rows at the addresses of lanes 8i to 8i + 7; lane l gets, of each matrix,
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; with .trans, of the transposed matrix.
template <bool transposed> inline void load_matrices(unsigned* registers, const void* row, const char* what, emulated::Place place) {
    if ((unsigned long long)row % 16 || !emulated::is_shared(row, 16))
        fail("%s:%d: %s from %p, which is not 16-byte aligned shared memory of this block", place.file, place.line, what, row);
    Matrices mine{row, registers};
    collective(0xffffffffu, &mine, [](void** operands, unsigned mask) {
        if (mask != 0xffffffffu) fail("load_matrices in a warp of less than 32 threads");
        for (int matrix = 0; matrix < 4; matrix++) {
            const unsigned short* rows[8];
            for (int i = 0; i < 8; i++) rows[i] = (const unsigned short*)((Matrices*)operands[8 * matrix + i])->row;
            for (int lane = 0; lane < 32; lane++) {
                int r = lane / 4, c = lane % 4 * 2;
                unsigned low = transposed ? rows[c][r] : rows[r][c], high = transposed ? rows[c + 1][r] : rows[r][c + 1];
                ((Matrices*)operands[lane])->registers[matrix] = low | high << 16;
            }
        }
    }, what, place);
}

struct Fragments {
    float* c;
    const unsigned* a;
    unsigned b[2];
};

// mma.m16n8k16 with 16-bit operands; g = lane / 4 and t = lane % 4. Element i of a (two to a register, the lower first) is
// at row g (+ 8 for i = 2, 3, 6, 7) and column 2 t + i % 2 (+ 8 for i >= 4); of b at row 2 t + i % 2 (+ 8 for i >= 2) and
// column g; of c at row g (+ 8 for i >= 2) and column 2 t + i % 2.
template <typename Element> inline void multiply_16x8x16(void** operands, unsigned mask) {
    if (mask != 0xffffffffu) fail("mma in a warp of less than 32 threads");
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        auto& mine = *(Fragments*)operands[lane];
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++)
            a[g + (i & 2 ? 8 : 0)][2 * t + i % 2 + (i >= 4 ? 8 : 0)] = to_float(Element{(unsigned short)(mine.a[i / 2] >> 16 * (i % 2))});
        for (int i = 0; i < 4; i++)
            b[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] = to_float(Element{(unsigned short)(mine.b[i / 2] >> 16 * (i % 2))});
    }
    float sum[16][8] = {};
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++) {
        auto& mine = *(Fragments*)operands[lane];
        for (int i = 0; i < 4; i++) mine.c[i] += sum[lane / 4 + (i >= 2 ? 8 : 0)][2 * (lane % 4) + i % 2];
    }
}

struct WholeFragments {
    int* c;
    const unsigned* a;
    unsigned b[2];
};

// mma.m16n8k32 with operands of 8 bits. Element i of a (four to a register) is at row g (+ 8 for i / 4 odd) and column
// 4 t + i % 4 (+ 16 for i >= 8); of b at row 4 t + i % 4 (+ 16 for i >= 4) and column g; of c as above.
inline void multiply_16x8x32(void** operands, unsigned mask) {
    if (mask != 0xffffffffu) fail("mma in a warp of less than 32 threads");
    int a[16][32], b[32][8];
    for (int lane = 0; lane < 32; lane++) {
        auto& mine = *(WholeFragments*)operands[lane];
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 16; i++)
            a[g + (i / 4 % 2 ? 8 : 0)][4 * t + i % 4 + (i >= 8 ? 16 : 0)] = (signed char)(mine.a[i / 4] >> 8 * (i % 4));
        for (int i = 0; i < 8; i++) b[4 * t + i % 4 + (i >= 4 ? 16 : 0)][g] = (signed char)(mine.b[i / 4] >> 8 * (i % 4));
    }
    int sum[16][8] = {};
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 32; k++)
            for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++) {
        auto& mine = *(WholeFragments*)operands[lane];
        for (int i = 0; i < 4; i++) mine.c[i] += sum[lane / 4 + (i >= 2 ? 8 : 0)][2 * (lane % 4) + i % 2];
    }
}

}  // namespace twins

DEVICE void load_matrices(unsigned (&registers)[4], const void* row, emulated::Place place = emulated::Place::here()) {
    twins::load_matrices<false>(registers, row, "load_matrices", place);
}
DEVICE void load_matrices_transposed(unsigned (&registers)[4], const void* row, emulated::Place place = emulated::Place::here()) {
    twins::load_matrices<true>(registers, row, "load_matrices_transposed", place);
}
template <typename Element>
DEVICE void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, emulated::Place place = emulated::Place::here()) {
    twins::Fragments mine{c, a, {b0, b1}};
    emulated::collective(0xffffffffu, &mine, twins::multiply_16x8x16<Element>, "mma_16x8x16", place);
}
DEVICE void mma_16x8x32(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, emulated::Place place = emulated::Place::here()) {
    twins::WholeFragments mine{c, a, {b0, b1}};
    emulated::collective(0xffffffffu, &mine, twins::multiply_16x8x32, "mma_16x8x32", place);
}
