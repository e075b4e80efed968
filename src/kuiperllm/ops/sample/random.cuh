// The random numbers that draws are made with; see philox.py.
#pragma once
#include "common.cuh"

// Philox4x32-10: a number from 0 up to but not including 1, as a multiple of 2**-64 of which the last 11 bits are 0.
DEVICE unsigned long long random_fraction(unsigned long long seed, unsigned position) {
    unsigned c0 = position, c1 = 0, c2 = 0, c3 = 0;
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned long long first = 0xd2511f53ull * c0, second = 0xcd9e8d57ull * c2;
        c0 = (unsigned)(second >> 32) ^ c1 ^ k0, c1 = (unsigned)second;
        c2 = (unsigned)(first >> 32) ^ c3 ^ k1, c3 = (unsigned)first;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    return ((unsigned long long)c0 << 32 | c1) & ~0x7ffull;
}
