// Codes of quantized weights in registers: packed words to pairs of 16-bit numbers, records of groups to factors.
//
// A scheme (quant/scheme.py) has BITS to a code and a coding. Packed rows of fewer than 8 bits are planes of 4, 2 or 1 bits,
// one plane of the whole matrix after the other, low bits first. In a word of a plane of b bits lie 32 / b columns; its
// columns 2i and 2i + 1 at bits b i and 16 + b i, so that one shift and one mask make two 16-bit lanes. 32 columns take as
// many words as a code has bits. 8 bits are bytes, those of MIDDLE signed: the code - 128.
//
// Bits of a code under a constant exponent make a number in one instruction: in bfloat16 0x4300 | code is 128 + code (for up
// to 7 bits), in float16 0x6400 | code is 1024 + code. Such lanes are "raw". What they are short of the code can be
// subtracted from them, or, cheaper, from a sum of products: it enters there as a multiple of the sum of x.
#pragma once
#include "common.cuh"

enum Coding { MIDDLE, ZEROS, MINIMUM, E4M3 };

// Bits of the widest plane of codes, and of the one after it (0: there is none).
__device__ constexpr int low_bits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }
__device__ constexpr int high_bits(int bits) { return bits - low_bits(bits); }
__device__ constexpr bool has_zeros(Coding coding) { return coding == ZEROS || coding == MINIMUM; }

// Facts about numbers of type V: the exponent under which the lowest bit of a code counts 1, and how many bits it covers.
template <typename V> struct Raw;
template <> struct Raw<bf16> { static constexpr unsigned EXPONENT = 0x43004300u; static constexpr int BITS_BELOW = 7, E4M3_SHIFT = 4; };
template <> struct Raw<f16> { static constexpr unsigned EXPONENT = 0x64006400u; static constexpr int BITS_BELOW = 10, E4M3_SHIFT = 7; };

// A raw lane of pair `pair` of 32 columns is raw_bias() + raw_unit() * code; that of e4m3 raw_unit() * number. 8-bit codes
// have no raw bfloat16.
template <typename V> __device__ constexpr float raw_bias(Coding coding) { return coding == E4M3 ? 0.f : (float)(1 << Raw<V>::BITS_BELOW); }
// How far up in its lane a code of fewer than 8 bits stays: float16 has room for two neighbouring pairs (or four of 2 bits).
template <typename V> __device__ constexpr int raw_place(int bits, int pair) {
    return bits < 8 && Raw<V>::BITS_BELOW == 10 ? low_bits(bits) * pair & 7 : 0;
}
template <typename V> __device__ constexpr float raw_unit(int bits, Coding coding, int pair) {
    if (coding == E4M3) return Raw<V>::BITS_BELOW == 10 ? 0x1p-8f : 0x1p-120f;  // the exponents' biases differ by so much
    return (float)(1 << raw_place<V>(bits, pair));
}

DEVICE unsigned shifted(unsigned word, int right) { return right >= 0 ? word >> right : word << -right; }

// Pair `pair` (0 ... 15) of 32 columns, raw. `words` are the columns' words, plane after plane.
template <typename V, int bits, Coding coding, int count> DEVICE unsigned raw_pair(const unsigned (&words)[count], int pair) {
    if constexpr (coding == E4M3) {
        // The sign to bit 15, exponent and mantissa where V has them.
        constexpr int shift = Raw<V>::E4M3_SHIFT;
        const unsigned two = __byte_perm(words[pair / 2], 0, pair % 2 ? 0x3424 : 0x1404);  // in the upper bytes of the lanes
        return (two & 0x80008000u) | (two >> (8 - shift) & (0x7fu << shift) * 0x10001u);
    } else if constexpr (bits == 8) {
        static_assert(Raw<V>::BITS_BELOW >= 8, "8-bit codes have no raw bfloat16");
        const unsigned word = coding == MIDDLE ? words[pair / 2] ^ 0x80808080u : words[pair / 2];
        return __byte_perm(word, Raw<V>::EXPONENT, pair % 2 ? 0x7352 : 0x7150);
    } else {
        constexpr int low = low_bits(bits), high = high_bits(bits);
        const int to = raw_place<V>(bits, pair), in_low = pair % (16 / low) * low;
        unsigned lanes = and_or(words[pair / (16 / low)] >> (in_low - to), (((1u << low) - 1) << to) * 0x10001u, Raw<V>::EXPONENT);
        if constexpr (high != 0) {
            const int in_high = pair % (16 / high) * high, high_to = to + low;
            lanes = and_or(shifted(words[low + pair / (16 / high)], in_high - high_to), (((1u << high) - 1) << high_to) * 0x10001u, lanes);
        }
        return lanes;
    }
}

// Two equal lanes of a constant.
template <typename V> DEVICE unsigned both(float value) { return pack2<V>(value, value); }

// 8-bit codes - 128 as bfloat16, exactly: the lower 7 bits, and 128 or 256 by the highest, each under the exponent.
template <Coding coding> DEVICE unsigned centred_bytes(unsigned word, int pair) {
    const unsigned lanes = __byte_perm(coding == MIDDLE ? word : word ^ 0x80808080u, Raw<bf16>::EXPONENT, pair % 2 ? 0x7352 : 0x7150);
    return fma2<bf16>(lanes & 0xff80ff80u, both<bf16>(-1.f), lanes & 0xff7fff7fu);
}

// Pair `pair` of 32 columns as numbers: code - 2^(bits - 1) whatever the coding, which is exact; of e4m3 the number.
template <typename V, int bits, Coding coding, int count> DEVICE unsigned centred_pair(const unsigned (&words)[count], int pair) {
    if constexpr (bits == 8 && coding != E4M3 && Raw<V>::BITS_BELOW < 8) {
        return centred_bytes<coding>(words[pair / 2], pair);
    } else {
        const float unit = raw_unit<V>(bits, coding, pair), middle = coding == E4M3 ? 0.f : (float)(1 << (bits - 1));
        return fma2<V>(raw_pair<V, bits, coding>(words, pair), both<V>(1.f / unit), both<V>(-raw_bias<V>(coding) / unit - middle));
    }
}

// What a group's weights are: factor * centred code (or number) + offset.
struct Group { float factor, offset; };

// From what lies beside each other in a record: a scale, and a zero or a minimum, as floats.
template <int bits, Coding coding> DEVICE Group group_of(float scale, float zero) {
    constexpr float middle = coding == E4M3 ? 0.f : (float)(1 << (bits - 1));
    if (coding == ZEROS) return {scale, scale * (middle - zero)};
    if (coding == MINIMUM) return {scale, scale * middle - zero};
    return {scale, 0.f};
}

// The record of group number `group` among all of the matrix; schemes with super-blocks also have a record for each of
// those, number `block`.
template <int bits, Coding coding, typename S> DEVICE Group load_group(const S* records, long long group, const f16*, long long) {
    if constexpr (!has_zeros(coding)) return group_of<bits, coding>(to_float(records[group]), 0.f);
    else return group_of<bits, coding>(to_float(records[2 * group]), to_float(records[2 * group + 1]));
}
template <int bits, Coding coding>
DEVICE Group load_group(const signed char* records, long long group, const f16* super_records, long long block) {
    if constexpr (!has_zeros(coding)) return group_of<bits, coding>(to_float(super_records[block]) * (float)records[group], 0.f);
    else return group_of<bits, coding>(to_float(super_records[2 * block]) * (float)records[2 * group],
                                       to_float(super_records[2 * block + 1]) * (float)records[2 * group + 1]);
}

// --- one code at a time, where speed is no matter -------------------------------------------------------------------

// e4m3 as a float.
DEVICE float e4m3_to_float(unsigned code) {
    return __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
}

// The centred code (or the number) of a column. `rows`: rows of the whole matrix, `width`: its columns.
template <int bits, Coding coding> DEVICE float centred_code(const unsigned char* data, long long rows, int width, long long row, int column) {
    if constexpr (bits == 8) {
        const unsigned code = data[row * width + column];
        if (coding == E4M3) return e4m3_to_float(code);
        return coding == MIDDLE ? (float)(signed char)code : (float)code - 128.f;
    } else {
        unsigned code = 0;
        int done = 0;
#pragma unroll
        for (int plane = 4; plane; plane /= 2) {
            if (!(bits & plane)) continue;
            const int columns = 32 / plane, place = column % columns / 2 * plane + column % 2 * 16;
            const unsigned word = ((const unsigned*)data)[(row * width + column) / columns];
            code |= (word >> place & ((1u << plane) - 1)) << done;
            data += rows * width * plane / 8, done += plane;
        }
        return (float)((int)code - (1 << (bits - 1)));
    }
}
