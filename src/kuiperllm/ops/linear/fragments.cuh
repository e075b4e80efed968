// Quantized weights as operands of tensor cores: lane l, with t = l % 4, holds columns 2t and 2t + 1 of each 8 columns of a row.
// The four lanes of a row read the same words of codes (codes.cuh), and each shifts its own pairs out of them.
//
//   BITS, CODING     the scheme; BITS 0: the matrix is not quantized
//   SCALE            f16 or float: type of scales; signed char: they are multipliers of an f16 that 256 columns share
#pragma once
#include "codes.cuh"

constexpr int LOW_BITS = BITS ? low_bits(BITS) : 0, HIGH_BITS = BITS ? high_bits(BITS) : 0;  // of the two planes
constexpr bool HAS_ZEROS = has_zeros(CODING);
constexpr int MIDDLE_CODE = BITS ? 1 << (BITS - 1) : 0;
// Whether codes are made numbers around zero before anything else. If not, a zero point is added to them instead.
constexpr bool CENTRED = CODING != ZEROS || BITS == 8;

DEVICE float to_float(signed char x) { return (float)x; }

// What makes weights of a group, in both lanes of words of V: factor * number + term, or, unless CENTRED, factor * (raw + term).
struct PairGroup {
    unsigned factor, term;
};
template <typename V> DEVICE PairGroup pair_group(float scale, float zero) {
    const Group group = group_of<BITS ? BITS : 8, CODING>(scale, zero);
    return {both<V>(group.factor), both<V>(CENTRED ? group.offset : -raw_bias<V>(CODING) - zero)};
}

// Numbers in both lanes of a word: 1, and what makes numbers of e4m3's exponents, 2^120 or 2^8.
template <typename V> constexpr unsigned ONES = Raw<V>::BITS_BELOW < 8 ? 0x3f803f80u : 0x3c003c00u;
template <typename V> constexpr unsigned E4M3_UNITS = Raw<V>::BITS_BELOW < 8 ? 0x7b807b80u : 0x5c005c00u;
constexpr unsigned NOTHING = 0x80008000u;  // -0 changes no sum
// Minus the raw middle code.
template <typename V> constexpr unsigned TO_CENTRE = Raw<V>::EXPONENT | 0x80008000u | MIDDLE_CODE * 0x00010001u;

// Where a lane's pairs lie: a selector of bytes, and how far up in words of a plane.
struct Place {
    unsigned bytes, four, two, one;
    DEVICE explicit Place(int t) : bytes(CODING == E4M3 ? 0x2020 * t + 0x1000 : 0x0202 * t + 0x0100), four(4 * t), two(2 * t), one(t) {}
};

template <int N> DEVICE void load_words(unsigned (&words)[N], const void* p) {
    constexpr int WIDTH = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < N; i += WIDTH) {
        const Pack<unsigned, WIDTH> pack = ((const Pack<unsigned, WIDTH>*)p)[i / WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; j++) words[i + j] = pack.item[j];
    }
}

// COLUMNS columns of a row, a multiple of 8, as they lie in the planes: whole words, or the lowest bits of a word.
template <int COLUMNS> struct Codes {
    static constexpr int LOW = COLUMNS * LOW_BITS / 32, HIGH = COLUMNS * HIGH_BITS / 32;
    unsigned low[LOW ? LOW : 1], high[HIGH ? HIGH : 1];

    // Columns `first` and on, from the words of both planes in which they begin.
    DEVICE void load(const void* low_words, const void* high_words, int first) {
        load_words(low, low_words);
        if (HIGH_BITS) load_words(high, high_words);
        if (LOW_BITS && !LOW) low[0] >>= first * LOW_BITS % 32 / 2;
        if (HIGH_BITS && !HIGH) high[0] >>= first * HIGH_BITS % 32 / 2;
    }

    // Columns 8 j + 2t and the next as numbers of V: around zero, or raw unless CENTRED.
    template <typename V> DEVICE unsigned numbers(int j, const Place& place) const {
        constexpr unsigned exponent = Raw<V>::EXPONENT;
        constexpr bool is_wide = Raw<V>::BITS_BELOW >= 8;
        if constexpr (LOW_BITS == 8) {
            const unsigned pair = __byte_perm(low[2 * j], low[2 * j + 1], place.bytes);  // and something in the other bytes
            if constexpr (CODING == E4M3) {
                const unsigned bits = and_or(pair, 0x80008000u, (pair & 0x7f007f00u) >> (8 - Raw<V>::E4M3_SHIFT));
                return fma2<V>(bits, E4M3_UNITS<V>, NOTHING);
            }
            constexpr unsigned flip = CODING == MIDDLE ? 0x00800080u : 0;  // makes codes of signed numbers
            if constexpr (is_wide) return fma2<V>(and_xor(pair, 0x00ff00ffu, exponent | flip), ONES<V>, TO_CENTRE<V>);
            // 7 bits have room below bfloat16's exponent. The eighth, if it is not set, makes -256 of the -128 that is added.
            const unsigned less = and_xor(pair, 0x00800080u, 0x80008000u | exponent | (0x00800080u ^ flip));
            return fma2<V>(and_or(pair, 0x007f007fu, exponent), ONES<V>, less);
        } else {
            unsigned pair;
            if constexpr (LOW_BITS == 4) pair = and_or(low[j] >> place.four, 0x000f000fu, exponent);
            else pair = and_or(shifted(low[j / 2] >> place.two, 8 * (j % 2)), 0x00030003u, exponent);
            if constexpr (HIGH_BITS == 2) pair = and_or(shifted(high[j / 2] >> place.two, 8 * (j % 2) - LOW_BITS), 0x00030003u << LOW_BITS, pair);
            if constexpr (HIGH_BITS == 1) pair = and_or(shifted(high[j / 4] >> place.one, 4 * (j % 4) - LOW_BITS), 0x00010001u << LOW_BITS, pair);
            return CENTRED ? fma2<V>(pair, ONES<V>, TO_CENTRE<V>) : pair;
        }
    }

    // The same as weights; factors, terms and weights are rounded to V.
    template <typename V> DEVICE unsigned weights(int j, const Place& place, const PairGroup& group) const {
        const unsigned n = numbers<V>(j, place);
        if (!HAS_ZEROS) return fma2<V>(n, group.factor, NOTHING);
        if (CENTRED) return fma2<V>(n, group.factor, group.term);
        return fma2<V>(fma2<V>(n, ONES<V>, group.term), group.factor, NOTHING);
    }
};
