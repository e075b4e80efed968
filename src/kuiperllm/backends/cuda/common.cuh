// The vocabulary of all kernels: element types, vector loads, reductions, asynchronous copies, dependent launch.
//
// Instructions that C++ has no words for are wrapped here and in mma.cuh, one small function each. Tests define
// KUIPER_EMULATED and bring functions of the same names, so that kernels also run on a processor.
#pragma once

#define DEVICE __device__ __forceinline__
#define WARP_ALL 0xffffffffu

extern __shared__ __align__(128) char shared_memory[];

// --- 16-bit floating point ---------------------------------------------------------------------------------

struct alignas(2) bf16 { unsigned short bits; };
struct alignas(2) f16 { unsigned short bits; };

#ifndef KUIPER_EMULATED

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
DEVICE float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <typename T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE bf16 from_float<bf16>(float x) {  // rounds to nearest even
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> DEVICE f16 from_float<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two neighbouring elements in one register, the lower address in the lower half.
template <typename T> DEVICE unsigned pack2(float low, float high);
template <> DEVICE unsigned pack2<bf16>(float low, float high) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <> DEVICE unsigned pack2<f16>(float low, float high) {
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <typename T> DEVICE float2 unpack2(unsigned pair);
template <> DEVICE float2 unpack2<bf16>(unsigned pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <> DEVICE float2 unpack2<f16>(unsigned pair) {
    float2 y;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(y.x), "=f"(y.y) : "r"(pair));
    return y;
}

// Of two pairs of elements and a third: a b + c, rounded once.
template <typename T> DEVICE unsigned fma2(unsigned a, unsigned b, unsigned c);
template <> DEVICE unsigned fma2<bf16>(unsigned a, unsigned b, unsigned c) {
    unsigned y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
template <> DEVICE unsigned fma2<f16>(unsigned a, unsigned b, unsigned c) {
    unsigned y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

// (a & mask) | bits, and with ^ in the place of |: one instruction each, which the compiler splits if two of three are constants.
DEVICE unsigned and_or(unsigned a, unsigned mask, unsigned bits) {
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(mask), "r"(bits));
    return y;
}
DEVICE unsigned and_xor(unsigned a, unsigned mask, unsigned bits) {
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(a), "r"(mask), "r"(bits));
    return y;
}

// --- dependent launch: a kernel may start while the one in front of it still runs ------------------------------

// Let the next kernel start. It waits for this one's end before it uses what this one writes.
DEVICE void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Wait until the kernel in front has ended. Before this, only constants may be read.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Keeps the compiler from computing a value again wherever it is used.
DEVICE int in_register(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The larger one, NaN if there is any.
DEVICE float max_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// --- asynchronous copies from global to shared memory -----------------------------------------------------------

// Where something is in shared memory: what copies and loads of matrices need. Made once, it need not be made for each.
using SharedAddress = unsigned;
DEVICE SharedAddress shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes, both addresses 16-byte aligned; bypasses the first-level cache.
DEVICE void copy_async(SharedAddress shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void copy_async(void* shared, const void* global) { copy_async(shared_address(shared), global); }
// The same, or 16 zero bytes: nothing is read if `valid` is false.
DEVICE void copy_async_or_zero(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// The first `bytes` (0 ... 4) of a word, zeros behind them; both addresses 4-byte aligned.
DEVICE void copy_async_word(SharedAddress shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
DEVICE void copy_async_word(void* shared, const void* global, int bytes) { copy_async_word(shared_address(shared), global, bytes); }
// The same of eight bytes.
DEVICE void copy_async_eight(SharedAddress shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
DEVICE void copy_async_eight(void* shared, const void* global, int bytes) { copy_async_eight(shared_address(shared), global, bytes); }
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most N of this thread's committed groups are still under way.
template <int N> DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#endif  // KUIPER_EMULATED

// --- vectors ----------------------------------------------------------------------------------------------------

// Bytes to floats: N elements of T that lie 16-byte (or N * sizeof(T), if that is less) aligned.
template <typename T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack { T item[N]; };

constexpr int VECTOR_BYTES = 16;
template <typename T> constexpr int VECTOR = VECTOR_BYTES / (int)sizeof(T);

// 16 bytes of elements as floats.
DEVICE void unpack(uint4 v, float (&x)[4], float) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
template <typename T> DEVICE void unpack(uint4 v, float (&x)[8], T) {
    float2 a = unpack2<T>(v.x), b = unpack2<T>(v.y), c = unpack2<T>(v.z), d = unpack2<T>(v.w);
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y, x[4] = c.x, x[5] = c.y, x[6] = d.x, x[7] = d.y;
}
DEVICE uint4 pack(const float (&x)[4], float) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
template <typename T> DEVICE uint4 pack(const float (&x)[8], T) {
    return make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}
template <typename T> DEVICE void load_vector(const T* p, float (&x)[VECTOR<T>]) { unpack(*(const uint4*)p, x, T()); }
template <typename T> DEVICE void store_vector(T* p, const float (&x)[VECTOR<T>]) { *(uint4*)p = pack(x, T()); }

// --- reductions -------------------------------------------------------------------------------------------------

struct Sum { DEVICE float operator()(float a, float b) const { return a + b; } };
struct Max { DEVICE float operator()(float a, float b) const { return fmaxf(a, b); } };

// Over the WIDTH neighbouring lanes that a lane belongs to; every lane gets the result.
template <int WIDTH = 32, typename V, typename Op> DEVICE V warp_reduce(V value, Op op) {
#pragma unroll
    for (int offset = WIDTH / 2; offset; offset >>= 1) value = op(value, __shfl_xor_sync(WARP_ALL, value, offset));
    return value;
}
DEVICE float warp_sum(float value) { return warp_reduce(value, Sum()); }
DEVICE float warp_max(float value) { return warp_reduce(value, Max()); }

// The largest of all lanes, in one instruction; floats that are not negative have the order of their bits.
DEVICE unsigned warp_max_bits(unsigned value) { return __reduce_max_sync(WARP_ALL, value); }

// Over a block of WARPS warps; every thread gets the result. `scratch` holds WARPS values and may be reused after
// the next __syncthreads().
template <int WARPS, typename V, typename Op> DEVICE V block_reduce(V value, V neutral, V* scratch, Op op) {
    value = warp_reduce(value, op);
    if (WARPS == 1) return value;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    value = lane < WARPS ? scratch[lane] : neutral;
    return warp_reduce(value, op);
}

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }
// 2^x, to about 22 bits; results below 2^-126 are 0.
DEVICE float exp2_approx(float x) {
#ifdef KUIPER_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
