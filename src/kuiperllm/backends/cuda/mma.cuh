// Tensor-core instructions that every chip since 8.0 has, one function each (PTX ISA, "Warp-level matrix instructions").
#pragma once
#include "common.cuh"

#ifndef KUIPER_EMULATED

// Four 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix l / 8
// (16 bytes) and gets elements (l / 4, 2 * (l % 4)) and the one beside it of each matrix.
DEVICE void load_matrices(unsigned (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
DEVICE void load_matrices(unsigned (&r)[4], const void* row) { load_matrices(r, shared_address(row)); }
// The same, each matrix transposed.
DEVICE void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// c[16x8] += a[16x16] b[16x8]. With g = lane / 4 and t = lane % 4: a[0], a[2] hold row g, a[1], a[3] row g + 8, columns 2t, 2t+1
// (a[2], a[3]: + 8); b[0] holds rows 2t, 2t+1 (b[1]: + 8) of column g; c[0], c[1] row g, c[2], c[3] row g + 8, columns 2t, 2t+1.
template <typename T> DEVICE void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <> DEVICE void mma_16x8x16<bf16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> DEVICE void mma_16x8x16<f16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c[16x8] += a[16x32] b[32x8], all whole numbers: a and b of 8 bits with a sign, four to a register. With g and t as above:
// a[0], a[2] hold row g, a[1], a[3] row g + 8, columns 4t ... 4t+3 (a[2], a[3]: + 16); b0 rows 4t ... 4t+3 (b1: + 16) of
// column g; c as above.
DEVICE void mma_16x8x32(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // KUIPER_EMULATED
