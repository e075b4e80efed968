// Instructions that only Hopper has (sm_90a), one small function each: barriers in shared memory, bulk tensor copies,
// clusters, and matrix products of a warpgroup (PTX ISA, "mbarrier", "cp.async.bulk.tensor", "wgmma").
//
// Shared memory is addressed by 32-bit numbers (`shared_address`). There is no emulation of these.
#pragma once
#include "common.cuh"

// What the host's tensor map describes to the bulk copy engine: a tensor in global memory and the tile to copy.
struct alignas(64) TensorMap { char opaque[128]; };

// --- barriers in shared memory: a phase ends when all arrivals and all announced bytes have come ----------------------

DEVICE void init_barrier(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// After the inits, before the __syncthreads() or sync_cluster() that lets others use the barriers.
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrive, and announce bytes that copies will bring in this phase.
DEVICE void arrive_expecting(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrive at the same barrier of block `rank` of the cluster. Relaxed: orders nothing, which is enough to give back a
// buffer that has been read (a release would cost a fence of the whole block).
DEVICE void arrive_remote(unsigned barrier, int rank) {
    asm volatile("{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [r];}"
                 ::"r"(barrier), "r"(rank) : "memory");
}
// Wait for the end of the phase of the given parity: 0 for a barrier's first phase, 1 for its second, 0 again, ...
// A barrier that was just made counts as having ended a phase of parity 1.
DEVICE void wait_barrier(unsigned barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}
// __syncthreads() for one warpgroup; `id` is 1 ... 15, one for each group.
DEVICE void sync_warpgroup(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }
// Two warpgroups that take turns, with an `id` for each: wait for one's own turn, give the other its turn.
DEVICE void wait_for_turn(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
DEVICE void give_turn(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }

// --- clusters ----------------------------------------------------------------------------------------------------------

DEVICE int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of all blocks of the cluster; orders no memory beyond published barriers.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The address in the cluster of what lies at `address` in block `rank`.
DEVICE unsigned remote_address(unsigned address, int rank) {
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}
// 16 bytes to another block's shared memory; its barrier counts them as arrived bytes. Both are remote addresses.
DEVICE void store_remote(unsigned remote, unsigned remote_barrier, float a, float b, float c, float d) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(remote), "f"(a), "f"(b), "f"(c), "f"(d), "r"(remote_barrier) : "memory");
}

// --- bulk tensor copies --------------------------------------------------------------------------------------------------

// What the second-level cache does with the lines of a copy.
enum Policy : unsigned long long { EVICT_NORMAL = 0x1000000000000000ull, EVICT_FIRST = 0x12F0000000000000ull, EVICT_LAST = 0x14F0000000000000ull };

DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// The tile at the given coordinates (innermost first, in elements) to shared memory; outside of the tensor it is zeros.
// The barrier counts all bytes of the tile as they arrive. One thread calls these.
DEVICE void load_tile(unsigned shared, const TensorMap* map, unsigned barrier, Policy policy, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(shared), "l"(map), "r"(x), "r"(y), "r"(barrier), "l"((unsigned long long)policy) : "memory");
}
DEVICE void load_tile(unsigned shared, const TensorMap* map, unsigned barrier, Policy policy, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;"
                 ::"r"(shared), "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"((unsigned long long)policy) : "memory");
}
DEVICE void load_tile(unsigned shared, const TensorMap* map, unsigned barrier, Policy policy, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
                 ::"r"(shared), "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "l"((unsigned long long)policy) : "memory");
}
// The same to each block of the cluster whose bit is set, at the same address, counted by its own barrier.
DEVICE void load_tile_shared(unsigned shared, const TensorMap* map, unsigned barrier, Policy policy, unsigned short blocks, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;"
                 ::"r"(shared), "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks), "l"((unsigned long long)policy) : "memory");
}
DEVICE void load_tile_shared(unsigned shared, const TensorMap* map, unsigned barrier, Policy policy, unsigned short blocks, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7, %8;"
                 ::"r"(shared), "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "h"(blocks), "l"((unsigned long long)policy) : "memory");
}
// A tile from shared to global memory, clipped at the tensor's edges. What threads wrote to shared memory needs a
// fence_async() by each of them and a barrier before one thread calls this; it begins a group of its own.
DEVICE void store_tile(const TensorMap* map, unsigned shared, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(shared), "r"(x), "r"(y) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Wait until at most N of this thread's stores still read their shared memory.
template <int N> DEVICE void wait_for_stores() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
// Let the copy engine and wgmma see what this thread wrote to shared memory.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- registers of accumulators and shared memory -------------------------------------------------------------------------

// Four (two) 8x8 matrices of 16-bit elements; lanes and elements as in load_matrices of mma.cuh.
DEVICE void load_matrices(unsigned (&r)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
DEVICE void load_matrices_transposed(unsigned (&r)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
DEVICE void store_matrices(unsigned row, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEVICE void store_matrices_transposed(unsigned row, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEVICE void store_matrices_transposed(unsigned row, unsigned a, unsigned b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(a), "r"(b) : "memory");
}
// 16 bytes, a word.
DEVICE void store_shared(unsigned shared, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
DEVICE float4 load_shared(unsigned shared) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(shared) : "memory");
    return v;
}
DEVICE unsigned load_shared_word(unsigned shared) {
    unsigned v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared) : "memory");
    return v;
}
DEVICE void store_shared_word(unsigned shared, unsigned v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(v) : "memory"); }
// Move a block's registers between its warpgroups: those that only copy keep N, those that multiply get N each thread.
template <int N> DEVICE void shrink_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void grow_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// --- matrix products of a warpgroup ------------------------------------------------------------------------------------------

// An operand in shared memory: tiles of 8 rows of 128 bytes with the copy engine's 128-byte swizzle, 1024-byte aligned
// at row 0 (address in bytes; it may point at another 32-byte step within the row).
// `stride` is the distance in bytes from one group of 8 rows to the next. `leading` matters for transposed operands
// wider than 64 elements only: the distance from one 64 columns to the next.
DEVICE unsigned long long matrix_descriptor(unsigned address, unsigned stride = 1024, unsigned leading = 16) {
    return (1ull << 62) | ((unsigned long long)(stride >> 4) << 32) | ((unsigned long long)(leading >> 4) << 16) | ((address & 0x3ffff) >> 4);
}
// Before the first product, and whenever accumulators or operands in registers were touched.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most N committed groups of products are still under way.
template <int N> DEVICE void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// After a wait: keeps the compiler from using these accumulators before it.
template <int N> DEVICE void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

template <typename T, int N> struct Wgmma;

// One specialization for an element type and a width: D accumulators named %0 ..., then the operands b, accumulate,
// transposed, a (or a[0] ... a[3]) as numbers B, C, T, A0 ... A3.
#define WGMMA(TYPE, NAME, N, ACCUMULATORS, B, C, T, A0, A1, A2, A3, ...)                                                              \
    template <> struct Wgmma<TYPE, N> {                                                                                               \
        template <int TRANSPOSED_B> static DEVICE void multiply(float (&d)[N / 2], unsigned long long a, unsigned long long b, int accumulate) { \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %" #C ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME    \
                         " {" ACCUMULATORS "}, %" #A0 ", %" #B ", p, 1, 1, 0, %" #T ";}"                                              \
                         : __VA_ARGS__ : "l"(b), "r"(accumulate), "n"(TRANSPOSED_B), "l"(a));                                         \
        }                                                                                                                             \
        template <int TRANSPOSED_B> static DEVICE void multiply(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, int accumulate) { \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %" #C ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME    \
                         " {" ACCUMULATORS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #T ";}"                 \
                         : __VA_ARGS__ : "l"(b), "r"(accumulate), "n"(TRANSPOSED_B), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));     \
        }                                                                                                                             \
    };
#define WGMMA_WIDTH(...) WGMMA(bf16, "bf16", __VA_ARGS__) WGMMA(f16, "f16", __VA_ARGS__)
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define HUNDRED TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9)
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64(i) D32(i), D32(i + 32)
WGMMA_WIDTH(16, "%0, %1, %2, %3, %4, %5, %6, %7", 8, 9, 10, 11, 12, 13, 14, D8(0))
WGMMA_WIDTH(32, TEN() "%10, %11, %12, %13, %14, %15", 16, 17, 18, 19, 20, 21, 22, D16(0))
WGMMA_WIDTH(64, TEN() TEN(1) TEN(2) "%30, %31", 32, 33, 34, 35, 36, 37, 38, D32(0))
WGMMA_WIDTH(96, TEN() TEN(1) TEN(2) TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47", 48, 49, 50, 51, 52, 53, 54, D32(0), D16(32))
WGMMA_WIDTH(128, TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63", 64, 65, 66, 67, 68, 69, 70, D64(0))
WGMMA_WIDTH(160, TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79", 80, 81, 82, 83, 84, 85, 86, D64(0), D16(64))
WGMMA_WIDTH(192, TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) "%90, %91, %92, %93, %94, %95", 96, 97, 98, 99, 100, 101, 102, D64(0), D32(64))
WGMMA_WIDTH(224, HUNDRED TEN(10) "%110, %111", 112, 113, 114, 115, 116, 117, 118, D64(0), D32(64), D16(96))
WGMMA_WIDTH(256, HUNDRED TEN(10) TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127", 128, 129, 130, 131, 132, 133, 134, D64(0), D64(64))
#undef WGMMA
#undef WGMMA_WIDTH
#undef TEN
#undef HUNDRED
#undef D4
#undef D8
#undef D16
#undef D32
#undef D64

// d[64 x 2R] = a[64 x 16] b[16 x 2R], added to d if `accumulate`; asynchronous. Thread t of the warpgroup, with lane l, holds
// rows r = 16 (t / 32) + l / 4 and r + 8: d[4 j], d[4 j + 1] are columns 8 j + 2 (l % 4) and the next of row r, d[4 j + 2],
// d[4 j + 3] those of row r + 8. `a` is a descriptor (rows are rows of a, 16 elements of each: 32 bytes) or registers as in
// mma_16x8x16, each warp its 16 rows. `b` is a descriptor; its rows are columns of the product, or, TRANSPOSED_B, the 16
// rows of b.
template <typename T, int TRANSPOSED_B = 0, int R, typename A> DEVICE void wgmma(float (&d)[R], const A& a, unsigned long long b, int accumulate = 1) {
    Wgmma<T, 2 * R>::template multiply<TRANSPOSED_B>(d, a, b, accumulate);
}
