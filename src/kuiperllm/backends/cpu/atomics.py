"""What kernels need to work together: atomic operations on int64, waiting, and calling other kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kuiperllm.backends.cpu.vectors import I8, I32, I64, call, target_has


@intrinsic
def atomic_add(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Add to an int64 as one step that all threads see in the same order; returns what was there before."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = builder.gep(values[0], [values[1]])
        return builder.atomic_rmw("add", address, values[2], "seq_cst")

    return types.int64(pointer, types.intp, types.int64), codegen


@intrinsic
def atomic_swap(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Replace an int64 as one step; returns what was there before."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = builder.gep(values[0], [values[1]])
        return builder.atomic_rmw("xchg", address, values[2], "seq_cst")

    return types.int64(pointer, types.intp, types.int64), codegen


@intrinsic
def atomic_load(context: Any, pointer: Any, index: Any) -> Any:
    """Read an int64 that other threads write."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load_atomic(builder.gep(values[0], [values[1]]), "seq_cst", 8)

    return types.int64(pointer, types.intp), codegen


@intrinsic
def atomic_store(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Write an int64 that other threads read."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store_atomic(values[2], builder.gep(values[0], [values[1]]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, types.int64), codegen


@intrinsic
def pause(context: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if target_has("is_x86"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_processor(context: Any) -> Any:
    """Let another thread run on this processor."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        call(builder, "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_kernel(context: Any, address: Any, arguments: Any, begin: Any, end: Any, thread: Any) -> Any:
    """Call a compiled kernel by its address (see `jit.Kernel.address` for its signature)."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = I8.as_pointer()
        kind = ir.FunctionType(I32, [pointer, pointer, pointer, I64, I64, I64])
        function = builder.inttoptr(values[0], kind.as_pointer())
        arguments = builder.inttoptr(values[1], pointer)
        with_stack = builder.alloca(ir.ArrayType(I8, 64))  # where a kernel may write its (void) result
        scratch = builder.bitcast(with_stack, pointer)
        builder.call(function, [scratch, scratch, arguments, *values[2:]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), codegen
