// The words of CUDA C++ for a processor: included in front of a kernel's source, in place of what NVRTC has built in.
#pragma once
#include "runtime.h"

#define KUIPER_EMULATED 1
#define __CUDA_ARCH__ 800

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))

// --- mathematics ---------------------------------------------------------------------------------------------------

#define EMULATED_MATH1(name) extern "C" float name(float);
EMULATED_MATH1(expf) EMULATED_MATH1(exp2f) EMULATED_MATH1(expm1f) EMULATED_MATH1(logf) EMULATED_MATH1(log2f)
EMULATED_MATH1(log1pf) EMULATED_MATH1(sinf) EMULATED_MATH1(cosf) EMULATED_MATH1(tanhf) EMULATED_MATH1(erff)
EMULATED_MATH1(sqrtf) EMULATED_MATH1(fabsf) EMULATED_MATH1(floorf) EMULATED_MATH1(ceilf) EMULATED_MATH1(truncf)
EMULATED_MATH1(rintf) EMULATED_MATH1(nearbyintf) EMULATED_MATH1(roundf)
#undef EMULATED_MATH1
extern "C" float powf(float, float);
extern "C" float fmaf(float, float, float);
extern "C" float ldexpf(float, int);
extern "C" double exp(double);
extern "C" double log(double);
extern "C" double sqrt(double);
extern "C" double fabs(double);

// The processor's own fminf and fmaxf are calls; like CUDA's, these give the other operand for a NaN.
inline float fminf(float a, float b) { return __builtin_isnan(b) || a < b ? a : b; }
inline float fmaxf(float a, float b) { return __builtin_isnan(b) || a > b ? a : b; }
inline float copysignf(float a, float b) { return __builtin_copysignf(a, b); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

#define EMULATED_MIN_MAX(type) \
    constexpr type min(type a, type b) { return b < a ? b : a; } \
    constexpr type max(type a, type b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int) EMULATED_MIN_MAX(unsigned) EMULATED_MIN_MAX(long) EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long) EMULATED_MIN_MAX(unsigned long long)
#undef EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
constexpr int abs(int x) { return x < 0 ? -x : x; }
constexpr unsigned umin(unsigned a, unsigned b) { return b < a ? b : a; }
constexpr unsigned umax(unsigned a, unsigned b) { return a < b ? b : a; }

// --- bits ----------------------------------------------------------------------------------------------------------

namespace emulated {
template <typename To, typename From> inline To reinterpret(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
// To the nearest integer, out of range to the nearest one there is, NaN to 0, as the hardware does.
inline int to_int(float x) {
    if (__builtin_isnan(x)) return 0;
    return x >= 2147483648.f ? 2147483647 : x < -2147483648.f ? -2147483647 - 1 : int(x);
}
}  // namespace emulated

inline unsigned __float_as_uint(float x) { return emulated::reinterpret<unsigned>(x); }
inline int __float_as_int(float x) { return emulated::reinterpret<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated::reinterpret<float>(x); }
inline float __int_as_float(int x) { return emulated::reinterpret<float>(x); }
inline long long __double_as_longlong(double x) { return emulated::reinterpret<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated::reinterpret<double>(x); }
inline int __float2int_rn(float x) { return emulated::to_int(rintf(x)); }
inline int __float2int_rz(float x) { return emulated::to_int(truncf(x)); }
inline int __float2int_rd(float x) { return emulated::to_int(floorf(x)); }
inline int __float2int_ru(float x) { return emulated::to_int(ceilf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y = y << 1 | (x >> i & 1);
    return y;
}
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned y = 0;
    for (int i = 0; i < 4; i++) {
        unsigned nibble = selector >> 4 * i, byte = unsigned(bytes >> 8 * (nibble & 7)) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        y |= byte << 8 * i;
    }
    return y;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
    return unsigned(((unsigned long long)high << 32 | low) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
    return unsigned(((unsigned long long)high << 32 | low) >> (n & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += int((signed char)(a >> i)) * int((signed char)(b >> i));
    return c;
}

// --- vectors -------------------------------------------------------------------------------------------------------

#define EMULATED_VECTORS(type, name, align2, align4) \
    struct name##1 { type x; }; \
    struct alignas(align2) name##2 { type x, y; }; \
    struct name##3 { type x, y, z; }; \
    struct alignas(align4) name##4 { type x, y, z, w; }; \
    inline name##1 make_##name##1(type x) { return {x}; } \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 emulated_uint3  // it is in runtime.h already
#define make_uint3 make_emulated_uint3
EMULATED_VECTORS(signed char, char, 2, 4)
EMULATED_VECTORS(unsigned char, uchar, 2, 4)
EMULATED_VECTORS(short, short, 4, 8)
EMULATED_VECTORS(unsigned short, ushort, 4, 8)
EMULATED_VECTORS(int, int, 8, 16)
EMULATED_VECTORS(unsigned, uint, 8, 16)
EMULATED_VECTORS(float, float, 8, 16)
EMULATED_VECTORS(long long, longlong, 16, 16)
EMULATED_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATED_VECTORS(double, double, 16, 16)
#undef uint3
#undef make_uint3
#undef EMULATED_VECTORS
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// --- memory --------------------------------------------------------------------------------------------------------

#define EMULATED_LOAD(name) template <typename Value> inline Value name(const Value* p) { return *p; }
EMULATED_LOAD(__ldg) EMULATED_LOAD(__ldca) EMULATED_LOAD(__ldcg) EMULATED_LOAD(__ldcs) EMULATED_LOAD(__ldlu) EMULATED_LOAD(__ldcv)
#undef EMULATED_LOAD
namespace emulated {
template <typename Value> struct Same { using Type = Value; };
}  // namespace emulated
#define EMULATED_STORE(name) \
    template <typename Value> inline void name(Value* p, typename emulated::Same<Value>::Type value) { *p = value; }
EMULATED_STORE(__stwb) EMULATED_STORE(__stcg) EMULATED_STORE(__stcs) EMULATED_STORE(__stwt)
#undef EMULATED_STORE
inline void __threadfence() { emulated::preempt(); }
inline void __threadfence_block() { emulated::preempt(); }
inline void __threadfence_system() { emulated::preempt(); }
inline void __nanosleep(unsigned) { emulated::preempt(); }
[[noreturn]] inline void __trap(emulated::Place place = emulated::Place::here()) { emulated::fail("%s:%d: __trap()", place.file, place.line); }

#define EMULATED_ATOMIC(name, result) \
    template <typename Value> inline Value name(Value* p, typename emulated::Same<Value>::Type value) { \
        emulated::preempt(); \
        Value old = *p; \
        *p = result; \
        return old; \
    }
EMULATED_ATOMIC(atomicAdd, old + value) EMULATED_ATOMIC(atomicSub, old - value) EMULATED_ATOMIC(atomicExch, value)
EMULATED_ATOMIC(atomicMin, value < old ? value : old) EMULATED_ATOMIC(atomicMax, old < value ? value : old)
EMULATED_ATOMIC(atomicAnd, old & value) EMULATED_ATOMIC(atomicOr, old | value) EMULATED_ATOMIC(atomicXor, old ^ value)
EMULATED_ATOMIC(atomicInc, old >= value ? 0 : old + 1) EMULATED_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMULATED_ATOMIC
template <typename Value>
inline Value atomicCAS(Value* p, typename emulated::Same<Value>::Type compare, typename emulated::Same<Value>::Type value) {
    emulated::preempt();
    Value old = *p;
    if (old == compare) *p = value;
    return old;
}

// --- barriers and warps --------------------------------------------------------------------------------------------

constexpr int warpSize = 32;

inline void __syncthreads(emulated::Place place = emulated::Place::here()) { emulated::barrier(0, 0, true, "__syncthreads", place); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulated::Place place = emulated::Place::here()) {
    emulated::collective(mask, nullptr, [](void**, unsigned) {}, "__syncwarp", place);
}

namespace emulated {

template <typename Value> struct Exchange {
    Value value, result;
    unsigned source;
};

// Every lane names the lane whose value it wants. A value of a lane that takes no part is undefined: all bits set.
template <typename Value> inline Value exchange(unsigned mask, Value value, unsigned source, const char* what, Place place) {
    static_assert(sizeof(Value) == 4 || sizeof(Value) == 8, "shuffles move 4 or 8 bytes");
    Exchange<Value> mine{value, value, source};
    collective(mask, &mine, [](void** operands, unsigned mask) {
        for (unsigned rest = mask; rest; rest &= rest - 1) {
            auto lane = static_cast<Exchange<Value>*>(operands[__builtin_ctz(rest)]);
            if (auto other = static_cast<Exchange<Value>*>(operands[lane->source])) lane->result = other->value;
            else __builtin_memset(&lane->result, 0xff, sizeof(Value));
        }
    }, what, place);
    return mine.result;
}

// Every lane brings a word; `Combine` makes one of the words of all lanes.
template <typename Word, typename Combine> inline Word agree(unsigned mask, Word word, Combine, const char* what, Place place) {
    collective(mask, &word, [](void** operands, unsigned mask) {
        Word result = 0;
        for (unsigned rest = mask; rest; rest &= rest - 1) {
            unsigned lane = __builtin_ctz(rest);
            Word word = *static_cast<Word*>(operands[lane]);
            result = rest == mask ? Combine::first(word, lane) : Combine::next(result, word, lane);
        }
        for (unsigned rest = mask; rest; rest &= rest - 1) *static_cast<Word*>(operands[__builtin_ctz(rest)]) = result;
    }, what, place);
    return word;
}

struct Ballot {
    static unsigned first(unsigned word, unsigned lane) { return unsigned(word != 0) << lane; }
    static unsigned next(unsigned all, unsigned word, unsigned lane) { return all | first(word, lane); }
};

#define EMULATED_COMBINE(name, expression) \
    struct name { \
        template <typename Word> static Word first(Word b, unsigned) { return b; } \
        template <typename Word> static Word next(Word a, Word b, unsigned) { return expression; } \
    };
EMULATED_COMBINE(Add, a + b) EMULATED_COMBINE(Min, b < a ? b : a) EMULATED_COMBINE(Max, a < b ? b : a)
EMULATED_COMBINE(And, a & b) EMULATED_COMBINE(Or, a | b) EMULATED_COMBINE(Xor, a ^ b)
#undef EMULATED_COMBINE

}  // namespace emulated

template <typename Value>
inline Value __shfl_sync(unsigned mask, Value value, int source, int width = 32, emulated::Place place = emulated::Place::here()) {
    unsigned first = emulated::lane & ~unsigned(width - 1);
    return emulated::exchange(mask, value, first + (unsigned(source) & (width - 1)), "__shfl_sync", place);
}
template <typename Value>
inline Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int width = 32, emulated::Place place = emulated::Place::here()) {
    unsigned own = emulated::lane & (width - 1);
    return emulated::exchange(mask, value, own < delta ? emulated::lane : emulated::lane - delta, "__shfl_up_sync", place);
}
template <typename Value>
inline Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32, emulated::Place place = emulated::Place::here()) {
    unsigned own = emulated::lane & (width - 1);
    return emulated::exchange(mask, value, own + delta >= unsigned(width) ? emulated::lane : emulated::lane + delta,
                              "__shfl_down_sync", place);
}
template <typename Value>
inline Value __shfl_xor_sync(unsigned mask, Value value, int bits, int width = 32, emulated::Place place = emulated::Place::here()) {
    unsigned source = emulated::lane ^ unsigned(bits), last = emulated::lane | unsigned(width - 1);
    return emulated::exchange(mask, value, source > last ? emulated::lane : source, "__shfl_xor_sync", place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulated::Place place = emulated::Place::here()) {
    return emulated::agree(mask, unsigned(predicate), emulated::Ballot(), "__ballot_sync", place);
}
inline int __any_sync(unsigned mask, int predicate, emulated::Place place = emulated::Place::here()) {
    return emulated::agree(mask, unsigned(predicate != 0), emulated::Or(), "__any_sync", place);
}
inline int __all_sync(unsigned mask, int predicate, emulated::Place place = emulated::Place::here()) {
    return emulated::agree(mask, unsigned(predicate != 0), emulated::And(), "__all_sync", place);
}
inline unsigned __activemask() { return 1u << emulated::lane; }  // the threads of a warp need not run together

#define EMULATED_REDUCE(name, Combine, type) \
    inline type name(unsigned mask, type value, emulated::Place place = emulated::Place::here()) { \
        return emulated::agree(mask, value, emulated::Combine(), #name, place); \
    }
EMULATED_REDUCE(__reduce_add_sync, Add, unsigned) EMULATED_REDUCE(__reduce_add_sync, Add, int)
EMULATED_REDUCE(__reduce_min_sync, Min, unsigned) EMULATED_REDUCE(__reduce_min_sync, Min, int)
EMULATED_REDUCE(__reduce_max_sync, Max, unsigned) EMULATED_REDUCE(__reduce_max_sync, Max, int)
EMULATED_REDUCE(__reduce_and_sync, And, unsigned) EMULATED_REDUCE(__reduce_or_sync, Or, unsigned)
EMULATED_REDUCE(__reduce_xor_sync, Xor, unsigned)
#undef EMULATED_REDUCE

// --- entry ---------------------------------------------------------------------------------------------------------

namespace emulated {

template <int... I> struct Indices {};

template <typename... Parameter, int... I>
inline void call(void (*kernel)(Parameter...), void** arguments, Indices<I...>) {
    kernel(*static_cast<Parameter*>(arguments[I])...);
}
template <typename... Parameter> inline void call(void (*kernel)(Parameter...), void** arguments) {
    call(kernel, arguments, Indices<__integer_pack(sizeof...(Parameter))...>());
}

// The sizes of a kernel's parameters, closed by 0.
template <typename... Parameter> inline void list_sizes(void (*)(Parameter...), int* sizes) {
    int all[] = {int(sizeof(Parameter))..., 0};
    for (int i = 0; i <= int(sizeof...(Parameter)); i++) sizes[i] = all[i];
}

}  // namespace emulated
