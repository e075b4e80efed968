"""The vocabulary of CPU kernels: raw pointers, and vectors of 16 lanes that live in registers.

`f32x16`, `i32x16` and `mask16` (one truth value per lane) are opaque Numba types over LLVM vectors. On
AVX-512 each is one register; on other targets LLVM splits them into what there is (two ymm, four NEON
registers). A function below compiles to the operation it names; where the target being compiled for has a
better instruction, the function picks it.

Pointers are indexed in elements: `x[i]` is a scalar, `load(x, i)` the 16 elements from there on.
bfloat16 and float16 data are reached through `u16p`, packed bytes through `u8p`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kuiperllm.backends.cpu.vectors import (
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    I64,
    KINDS,
    VF,
    VI,
    VI8,
    VI16,
    address_of,
    call,
    constant,
    define,
    halves,
    join,
    memory_load,
    memory_store,
    present_target,
    splat_value,
    target_has,
)
from kuiperllm.backends.cpu.vectors import (
    f32p as f32p,
)
from kuiperllm.backends.cpu.vectors import (
    f32x16 as f32x16,
)
from kuiperllm.backends.cpu.vectors import (
    i8p as i8p,
)
from kuiperllm.backends.cpu.vectors import (
    i32p as i32p,
)
from kuiperllm.backends.cpu.vectors import (
    i32x16 as i32x16,
)
from kuiperllm.backends.cpu.vectors import (
    i64p as i64p,
)
from kuiperllm.backends.cpu.vectors import (
    mask16 as mask16,
)
from kuiperllm.backends.cpu.vectors import (
    u8p as u8p,
)
from kuiperllm.backends.cpu.vectors import (
    u16p as u16p,
)

# --- arguments and pointers ---------------------------------------------------------------------------------


def slot(kind: Any) -> Any:
    """Read one argument of a kernel as the type that its annotation (a key of `KINDS`) stands for."""
    result = KINDS[kind]

    @intrinsic
    def read(context: Any, arguments: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            raw = builder.load(builder.gep(values[0], [values[1]]))
            if kind is int:
                return raw
            if kind is float:
                return builder.fptrunc(builder.bitcast(raw, F64), F32)
            return builder.inttoptr(raw, context.get_value_type(result))

        return result(arguments, types.intp), codegen

    return read


@intrinsic
def offset(context: Any, pointer: Any, elements: Any) -> Any:
    """The pointer, moved by a number of elements."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.gep(values[0], [values[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic
def unrelated(context: Any, pointer: Any) -> Any:
    """The same pointer, but the compiler cannot know: it keeps nothing that is stored there in registers."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = values[0].type
        return builder.asm(ir.FunctionType(kind, [kind]), "", "=r,0", values, False)

    return pointer(pointer), codegen


@intrinsic
def load_8bytes(context: Any, pointer: Any, index: Any) -> Any:
    """Eight bytes at pointer + index elements as an int64, the first one the lowest."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(address_of(builder, values[0], values[1], I64), align=1)

    return types.int64(pointer, types.intp), codegen


def _cast(result: Any) -> Any:
    @intrinsic
    def cast_operation(context: Any, pointer: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], context.get_value_type(result))

        return result(pointer), codegen

    return cast_operation


as_f32p, as_i32p, as_i64p = _cast(KINDS[f32p]), _cast(KINDS[i32p]), _cast(KINDS[i64p])
as_u16p, as_u8p, as_i8p = _cast(KINDS[u16p]), _cast(KINDS[u8p]), _cast(KINDS[i8p])


@intrinsic
def i64p_at(context: Any, address: Any) -> Any:
    """A pointer to int64 from an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], I64.as_pointer())

    return KINDS[i64p](types.int64), codegen


def _prefetch(intent: int, locality: int = 3) -> Any:
    @intrinsic
    def fetch(context: Any, pointer: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            address = address_of(builder, values[0], values[1], I8)
            write, keep, data = (ir.Constant(I32, v) for v in (intent, locality, 1))
            call(builder, "llvm.prefetch.p0", ir.VoidType(), address, write, keep, data)
            return context.get_dummy_value()

        return types.void(pointer, types.intp), codegen

    return fetch


# Ask for the cache line of pointer + index, to read it (`to_l2`: not at once) or to write to it; an address
# outside the memory does no harm.
prefetch = _prefetch(0)
prefetch_to_l2 = _prefetch(0, 2)
prefetch_for_write = _prefetch(1)


# --- loads and stores ---------------------------------------------------------------------------------------


def _widen_bf16(builder: Any, bits: Any) -> Any:
    wide = builder.shl(builder.zext(bits, VI), constant(VI, 16))
    return builder.bitcast(wide, VF)


def _narrow_bf16(builder: Any, vector: Any) -> Any:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = builder.bitcast(vector, VI)
    odd = builder.and_(builder.lshr(bits, constant(VI, 16)), constant(VI, 1))
    rounded = builder.add(bits, builder.add(odd, constant(VI, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    quiet = builder.or_(bits, constant(VI, 0x400000))
    return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), constant(VI, 16)), VI16)


def _widen_f16(builder: Any, bits: Any) -> Any:
    if target_has("has_f16c"):
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), 16)), VF)
    # Move exponent and mantissa into place and rescale by 2**112, which also makes subnormals right;
    # infinities and NaN (exponent 31) get float32's exponent.
    wide = builder.zext(bits, VI)
    sign = builder.shl(builder.and_(wide, constant(VI, 0x8000)), constant(VI, 16))
    magnitude = builder.shl(builder.and_(wide, constant(VI, 0x7FFF)), constant(VI, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, VF), constant(VF, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, constant(VI, 0x7C00 << 13))
    infinite = builder.or_(magnitude, constant(VI, 0x7F800000))
    value = builder.select(special, infinite, builder.bitcast(scaled, VI))
    return builder.bitcast(builder.or_(value, sign), VF)


def _narrow_f16(builder: Any, vector: Any) -> Any:
    if target_has("has_f16c"):
        return builder.bitcast(builder.fptrunc(vector, ir.VectorType(ir.HalfType(), 16)), VI16)
    # Scale by 2**-112 so that float32's rounding and subnormals become float16's, after rounding away the
    # 13 low bits by adding and subtracting half of the wanted unit.
    bits = builder.bitcast(vector, VI)
    sign = builder.lshr(builder.and_(bits, constant(VI, -0x80000000)), constant(VI, 16))
    magnitude = builder.and_(bits, constant(VI, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, constant(VI, 13)), constant(VI, 1))
    rounded = builder.add(magnitude, builder.add(odd, constant(VI, 0xFFF)))
    normal = builder.sub(builder.lshr(rounded, constant(VI, 13)), constant(VI, 112 << 10))
    # below 2**-14 the unit is 2**-24: adding 0.5 puts that unit at the last mantissa bit
    shifted = builder.fadd(builder.bitcast(magnitude, VF), constant(VF, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, VI), constant(VI, 0x3F000000))
    small = builder.icmp_unsigned("<", magnitude, constant(VI, 0x38800000))
    overflow = builder.icmp_unsigned(">=", magnitude, constant(VI, 0x477FF000))
    is_nan = builder.icmp_unsigned(">", magnitude, constant(VI, 0x7F800000))
    value = builder.select(small, subnormal, normal)
    value = builder.select(overflow, constant(VI, 0x7C00), value)
    value = builder.select(is_nan, constant(VI, 0x7E00), value)
    return builder.trunc(builder.or_(value, sign), VI16)


load = memory_load(VF, f32x16, lambda b, v: v)
load_i32 = memory_load(VI, i32x16, lambda b, v: v)  # also: 64 raw bytes
load_bf16 = memory_load(VI16, f32x16, _widen_bf16)
load_f16 = memory_load(VI16, f32x16, _widen_f16)
load_i8 = memory_load(VI8, i32x16, lambda b, v: b.sext(v, VI))
store = memory_store(f32x16, lambda b, v: v)
store_i32 = memory_store(i32x16, lambda b, v: v)
store_bf16 = memory_store(f32x16, _narrow_bf16)
store_f16 = memory_store(f32x16, _narrow_f16)
store_i8 = memory_store(i32x16, lambda b, v: b.trunc(v, VI8))
broadcast = memory_load(F32, f32x16, splat_value)
broadcast_4bytes = memory_load(I32, i32x16, splat_value)


@intrinsic
def gather(context: Any, pointer: Any, indices: Any) -> Any:
    """16 elements, each from where its lane of `indices` says."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        found = ir.Constant(VF, ir.Undefined)
        for i in range(16):
            lane = ir.Constant(I32, i)
            index = builder.sext(builder.extract_element(values[1], lane), I64)
            found = builder.insert_element(found, builder.load(builder.gep(values[0], [index])), lane)
        return found

    return f32x16(pointer, i32x16), codegen


def _lanes_below(builder: Any, count: Any) -> Any:
    """Mask of the lanes whose number is below `count`."""
    lanes = ir.Constant(VI, [*range(16)])
    return builder.icmp_signed("<", lanes, splat_value(builder, builder.trunc(count, I32)))


@intrinsic
def store_quads(context: Any, pointer: Any, index: Any, vector: Any, distance: Any) -> Any:
    """Store 16 lanes as bytes: four at pointer + index, the next four `distance` elements on, and so on."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer, index, vector, distance = values
        words = builder.bitcast(builder.trunc(vector, VI8), ir.VectorType(I32, 4))
        for lane in range(4):
            word = builder.extract_element(words, ir.Constant(I32, lane))
            builder.store(word, address_of(builder, pointer, index, I32), align=1)
            index = builder.add(index, distance)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, i32x16, types.intp), codegen


@intrinsic
def store_first(context: Any, pointer: Any, index: Any, vector: Any, count: Any) -> Any:
    """Store the first `count` lanes only."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = address_of(builder, values[0], values[1], VF)
        mask = _lanes_below(builder, values[3])
        call(
            builder,
            "llvm.masked.store.v16f32.p0",
            ir.VoidType(),
            values[2],
            address,
            ir.Constant(I32, 1),
            mask,
        )
        return context.get_dummy_value()

    return types.void(pointer, types.intp, f32x16, types.int64), codegen


@intrinsic
def load_first(context: Any, pointer: Any, index: Any, count: Any) -> Any:
    """Load the first `count` lanes; the others are 0 and their memory is not touched."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = address_of(builder, values[0], values[1], VF)
        mask = _lanes_below(builder, values[2])
        return call(
            builder, "llvm.masked.load.v16f32.p0", VF, address, ir.Constant(I32, 1), mask, constant(VF, 0.0)
        )

    return f32x16(pointer, types.intp, types.int64), codegen


# --- arithmetic -------------------------------------------------------------------------------------------


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    # llvm.fma becomes a library call where the processor has no such instruction; llvm.fmuladd does not
    return call(b, "llvm.fma.v16f32" if target_has("has_fma") else "llvm.fmuladd.v16f32", VF, x, y, z)


def _round_to_i32(b: Any, x: Any) -> Any:
    if target_has("has_fma"):
        return b.fptosi(call(b, "llvm.rint.v16f32", VF, x), VI)
    # llvm.rint is a library call before SSE4.1; adding 1.5 * 2**23 puts the integer in the lowest bits
    shifted = b.fadd(x, constant(VF, 12582912.0))
    return b.sub(b.bitcast(shifted, VI), constant(VI, 0x4B400000))


def _reduce(operation: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def generate(builder: Any, vector: Any) -> Any:
        while vector.type.count > 1:
            if vector.type.count == 2:
                low, high = (builder.extract_element(vector, ir.Constant(I32, i)) for i in (0, 1))
                return operation(builder, low, high)
            vector = operation(builder, *halves(builder, vector))
        return vector

    return generate


def _select(predicate: str) -> Callable[[Any, Any, Any], Any]:
    return lambda b, x, y: b.select(b.fcmp_ordered(predicate, x, y), x, y)


zeros = define(lambda b: constant(VF, 0.0), f32x16)
splat = define(splat_value, f32x16, types.float32)
splat_i32 = define(splat_value, i32x16, types.int32)
add = define(lambda b, x, y: b.fadd(x, y), f32x16, f32x16, f32x16)
sub = define(lambda b, x, y: b.fsub(x, y), f32x16, f32x16, f32x16)
mul = define(lambda b, x, y: b.fmul(x, y), f32x16, f32x16, f32x16)
div = define(lambda b, x, y: b.fdiv(x, y), f32x16, f32x16, f32x16)
fma = define(_fma, f32x16, f32x16, f32x16, f32x16)
vmin = define(_select("<"), f32x16, f32x16, f32x16)
vmax = define(_select(">"), f32x16, f32x16, f32x16)
vabs = define(lambda b, x: call(b, "llvm.fabs.v16f32", VF, x), f32x16, f32x16)
sum_lanes = define(_reduce(lambda b, x, y: b.fadd(x, y)), types.float32, f32x16)
max_lanes = define(_reduce(_select(">")), types.float32, f32x16)
sum_lanes_i32 = define(_reduce(lambda b, x, y: b.add(x, y)), types.int32, i32x16)
keep_first = define(
    lambda b, x, count, fill: b.select(_lanes_below(b, count), x, splat_value(b, fill)),
    f32x16, f32x16, types.int64, types.float32,
)  # fmt: skip

add_i32 = define(lambda b, x, y: b.add(x, y), i32x16, i32x16, i32x16)
sub_i32 = define(lambda b, x, y: b.sub(x, y), i32x16, i32x16, i32x16)
mul_i32 = define(lambda b, x, y: b.mul(x, y), i32x16, i32x16, i32x16)
and_i32 = define(lambda b, x, y: b.and_(x, y), i32x16, i32x16, i32x16)
or_i32 = define(lambda b, x, y: b.or_(x, y), i32x16, i32x16, i32x16)
shl = define(lambda b, x, n: b.shl(x, splat_value(b, n)), i32x16, i32x16, types.int32)
shr = define(lambda b, x, n: b.lshr(x, splat_value(b, n)), i32x16, i32x16, types.int32)
unsigned_byte = define(
    lambda b, x, n: b.and_(b.lshr(x, splat_value(b, n)), constant(VI, 0xFF)), i32x16, i32x16, types.int32
)
to_f32 = define(lambda b, x: b.sitofp(x, VF), f32x16, i32x16)
to_i32 = define(lambda b, x: b.fptosi(x, VI), i32x16, f32x16)
round_to_i32 = define(_round_to_i32, i32x16, f32x16)  # ties to even; |x| < 2**22
as_i32 = define(lambda b, x: b.bitcast(x, VI), i32x16, f32x16)
as_f32 = define(lambda b, x: b.bitcast(x, VF), f32x16, i32x16)
float_of = define(lambda b, x: b.bitcast(x, F32), types.float32, types.int32)
half_to_float = define(
    lambda b, x: b.extract_element(_widen_f16(b, splat_value(b, x)), ir.Constant(I32, 0)),
    types.float32, types.uint16,
)  # fmt: skip
float_to_half = define(
    lambda b, x: b.extract_element(_narrow_f16(b, splat_value(b, x)), ir.Constant(I32, 0)),
    types.uint16, types.float32,
)  # fmt: skip
bits_of = define(lambda b, x: b.bitcast(x, I32), types.int32, types.float32)
pair_bf16 = define(  # rounded to nearest, ties away from zero
    lambda b, even, odd: b.or_(
        b.lshr(b.add(b.bitcast(even, VI), constant(VI, 0x8000)), constant(VI, 16)),
        b.and_(b.add(b.bitcast(odd, VI), constant(VI, 0x8000)), constant(VI, -65536)),
    ),
    i32x16, f32x16, f32x16,
)  # fmt: skip
even_bf16 = define(lambda b, x: b.bitcast(b.shl(x, constant(VI, 16)), VF), f32x16, i32x16)
odd_bf16 = define(lambda b, x: b.bitcast(b.and_(x, constant(VI, -65536)), VF), f32x16, i32x16)

sqrt = define(lambda b, x: call(b, "llvm.sqrt.f32", F32, x), types.float32, types.float32)


# --- comparing --------------------------------------------------------------------------------------------


def _count_lanes(builder: Any, mask: Any) -> Any:
    return builder.zext(call(builder, "llvm.ctpop.i16", I16, builder.bitcast(mask, I16)), I64)


def _first_lane(builder: Any, mask: Any) -> Any:
    bits = builder.zext(builder.bitcast(mask, I16), I32)
    bits = builder.or_(bits, ir.Constant(I32, 1 << 16))
    return builder.zext(call(builder, "llvm.cttz.i32", I32, bits, ir.Constant(I1, 1)), I64)


# NaN compares false.
greater = define(lambda b, x, y: b.fcmp_ordered(">", x, y), mask16, f32x16, f32x16)
at_least = define(lambda b, x, y: b.fcmp_ordered(">=", x, y), mask16, f32x16, f32x16)
equal = define(lambda b, x, y: b.fcmp_ordered("==", x, y), mask16, f32x16, f32x16)
both = define(lambda b, x, y: b.and_(x, y), mask16, mask16, mask16)
where = define(lambda b, m, x, y: b.select(m, x, y), f32x16, mask16, f32x16, f32x16)
count_lanes = define(_count_lanes, types.int64, mask16)
first_lane = define(_first_lane, types.int64, mask16)  # 16 if there is none
min_lanes = define(_reduce(_select("<")), types.float32, f32x16)


# --- exponential ------------------------------------------------------------------------------------------


@njit(nogil=True, forceinline=True)
def exp(x: Any) -> Any:
    """e**x in each lane, to 1.5 units in the last place; below -87.3 it is 0, above 88.3 e**88.3, of NaN NaN.

    Range reduction with a two-part ln 2 (Cody and Waite) and a polynomial of degree 6 that starts with 1 + r
    and whose other coefficients minimize the largest relative error on |r| <= ln 2 / 2 (3e-9).
    """
    log2e, ln2_high, ln2_low = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
    clamped = vmax(vmin(x, splat(np.float32(88.3))), splat(np.float32(-87.3)))
    n = round_to_i32(mul(clamped, splat(log2e)))
    nf = to_f32(n)
    r = fma(nf, splat(-ln2_low), fma(nf, splat(-ln2_high), clamped))
    p = fma(splat(np.float32(0.00138145)), r, splat(np.float32(0.00836878)))
    p = fma(p, r, splat(np.float32(0.04166839)))
    p = fma(p, r, splat(np.float32(0.1666652)))
    p = fma(p, r, splat(np.float32(0.49999993)))
    p = fma(p, r, splat(np.float32(1)))
    p = fma(p, r, splat(np.float32(1)))
    value = as_f32(add_i32(as_i32(p), shl(n, np.int32(23))))
    return where(at_least(x, splat(np.float32(-87.3))), value, _nan_or_zero(x))


_nan_or_zero = define(
    lambda b, x: b.select(b.fcmp_unordered("uno", x, x), x, constant(VF, 0.0)), f32x16, f32x16
)


# --- dot products of packed bytes and pairs ---------------------------------------------------------------


def _dot4(builder: Any, accumulator: Any, weights: Any, activations: Any) -> Any:
    """Each lane: accumulator + the sum over four bytes of unsigned weight x signed activation."""
    target = present_target()
    if target.at_least("avx512"):
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", VI, accumulator, weights, activations)
    if target.is_x86 and target.at_least("avx2"):
        # bytes 0 and 2, then 1 and 3, as 16-bit pairs: pmaddwd is exact, where pmaddubsw would saturate
        pairs = ir.VectorType(I16, 32)
        w, x = builder.bitcast(weights, pairs), builder.bitcast(activations, pairs)
        eight = constant(pairs, 8)
        products = [
            (builder.and_(w, constant(pairs, 0xFF)), builder.ashr(builder.shl(x, eight), eight)),
            (builder.lshr(w, eight), builder.ashr(x, eight)),
        ]
        for left, right in products:
            sums = [
                call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), p, q)
                for p, q in zip(halves(builder, left), halves(builder, right), strict=True)
            ]
            accumulator = builder.add(accumulator, join(builder, *sums))
        return accumulator
    for byte in range(4):
        w = builder.and_(builder.lshr(weights, constant(VI, 8 * byte)), constant(VI, 0xFF))
        x = builder.ashr(builder.shl(activations, constant(VI, 24 - 8 * byte)), constant(VI, 24))
        accumulator = builder.add(accumulator, builder.mul(w, x))
    return accumulator


def _dot2_i16(builder: Any, accumulator: Any, x: Any, y: Any) -> Any:
    """Each lane: accumulator + the sum over two products of signed 16-bit numbers."""
    target = present_target()
    if target.at_least("avx512"):
        return call(builder, "llvm.x86.avx512.vpdpwssd.512", VI, accumulator, x, y)
    if target.is_x86 and target.at_least("avx2"):
        pairs, sums = ir.VectorType(I16, 32), ir.VectorType(I32, 8)
        operands = (halves(builder, builder.bitcast(v, pairs)) for v in (x, y))
        products = [
            call(builder, "llvm.x86.avx2.pmadd.wd", sums, p, q) for p, q in zip(*operands, strict=True)
        ]
        return builder.add(accumulator, join(builder, *products))
    sixteen = constant(VI, 16)
    for low in (True, False):
        a, b = (builder.ashr(builder.shl(v, sixteen) if low else v, sixteen) for v in (x, y))
        accumulator = builder.add(accumulator, builder.mul(a, b))
    return accumulator


dot4 = define(_dot4, i32x16, i32x16, i32x16, i32x16)
dot2_i16 = define(_dot2_i16, i32x16, i32x16, i32x16, i32x16)

# AVX512_BF16: each lane: accumulator + two products of bfloat16 pairs, summed in float32.
dot2_bf16 = define(
    lambda b, acc, x, y: call(b, "llvm.x86.avx512bf16.dpbf16ps.512", VF, acc, x, y),
    f32x16, f32x16, i32x16, i32x16,
)  # fmt: skip
