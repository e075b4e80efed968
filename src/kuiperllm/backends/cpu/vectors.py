"""What the vocabulary of kernels is made of: Numba types for pointers and vectors, and ways to define words.

`simd.py` is the vocabulary itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from kuiperllm.backends.cpu.features import Target

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
VI, VF = ir.VectorType(I32, 16), ir.VectorType(F32, 16)
VI8, VI16 = ir.VectorType(I8, 16), ir.VectorType(I16, 16)

_target: Target | None = None


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within this context, functions compile to the best that `target` has."""
    global _target
    before, _target = _target, target
    try:
        yield
    finally:
        _target = before


def present_target() -> Target:
    """The target being compiled for."""
    assert _target is not None, "vector functions compile within compiling_for() only"
    return _target


def target_has(attribute: str) -> bool:
    """Whether the target being compiled for has this attribute of `Target`."""
    return bool(getattr(present_target(), attribute))


# --- types ------------------------------------------------------------------------------------------------


class Pointer:
    """Annotation of a kernel's parameter that is a raw pointer."""

    def __getitem__(self, index: int) -> Any: ...
    def __setitem__(self, index: int, value: Any) -> None: ...


class f32p(Pointer):
    """Pointer to float32."""


class i32p(Pointer):
    """Pointer to int32."""


class i64p(Pointer):
    """Pointer to int64."""


class i8p(Pointer):
    """Pointer to int8."""


class u8p(Pointer):
    """Pointer to bytes."""


class u16p(Pointer):
    """Pointer to bfloat16 or float16, as bits."""


KINDS: dict[Any, Any] = {
    f32p: types.CPointer(types.float32),
    i32p: types.CPointer(types.int32),
    i64p: types.CPointer(types.int64),
    i8p: types.CPointer(types.int8),
    u8p: types.CPointer(types.uint8),
    u16p: types.CPointer(types.uint16),
    int: types.int64,
    float: types.float32,
}
"""Annotations that kernels may use and the Numba types they stand for."""


class Vector(types.Type):
    """A Numba type that is one LLVM vector."""

    def __init__(self, name: str, llvm_type: ir.VectorType) -> None:
        super().__init__(name)
        self.llvm_type = llvm_type


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm_type)


f32x16, i32x16 = Vector("f32x16", VF), Vector("i32x16", VI)
mask16 = Vector("mask16", ir.VectorType(I1, 16))


# --- how operations are defined -----------------------------------------------------------------------------


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic or C function."""
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        function = ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def define(generate: Callable[..., Any], result: Any, *arguments: Any) -> Any:
    """An operation on values of fixed types: `generate(builder, *llvm values) -> llvm value`."""

    def typer(context: Any, *given: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            outcome = generate(builder, *values)
            return context.get_dummy_value() if result is types.void else outcome

        return result(*arguments), codegen

    names = ", ".join(f"a{i}" for i in range(len(arguments)))
    scope: dict[str, Any] = {"typer": typer}
    exec(f"def operation(context, {names}): return typer(context, {names})", scope)
    return intrinsic(scope["operation"])


def address_of(builder: Any, pointer: Any, index: Any, llvm_type: Any) -> Any:
    """LLVM's pointer to an `llvm_type` at pointer + index elements."""
    return builder.bitcast(builder.gep(pointer, [index]), llvm_type.as_pointer())


def memory_load(llvm_type: Any, result: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """A load of `llvm_type` at pointer + index, converted to `result`."""

    @intrinsic
    def load_operation(context: Any, pointer: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            address = address_of(builder, values[0], values[1], llvm_type)
            return convert(builder, builder.load(address, align=1))

        return result(pointer, types.intp), codegen

    return load_operation


def memory_store(source: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """A store of a vector, converted, at pointer + index."""

    @intrinsic
    def store_operation(context: Any, pointer: Any, index: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = convert(builder, values[2])
            builder.store(value, address_of(builder, values[0], values[1], value.type), align=1)
            return context.get_dummy_value()

        return types.void(pointer, types.intp, source), codegen

    return store_operation


def constant(llvm_type: Any, value: Any) -> Any:
    """A vector with the same constant in each lane."""
    return ir.Constant(llvm_type, [value] * llvm_type.count)


def splat_value(builder: Any, value: Any, count: int = 16) -> Any:
    """A vector with the same value in each lane."""
    one = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, count), ir.Undefined), value, ir.Constant(I32, 0)
    )
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, count), [0] * count))


def halves(builder: Any, vector: Any) -> tuple[Any, Any]:
    """The lower and the upper lanes of a vector."""
    count = vector.type.count // 2
    low, high = ([*range(count)], [*range(count, 2 * count)])
    mask = ir.VectorType(I32, count)
    return (
        builder.shuffle_vector(vector, vector, ir.Constant(mask, low)),
        builder.shuffle_vector(vector, vector, ir.Constant(mask, high)),
    )


def join(builder: Any, low: Any, high: Any) -> Any:
    """One vector of two."""
    count = low.type.count * 2
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, count), [*range(count)]))
