"""The C functions that let go of a tensor handed to another library by DLPack.

A consumer calls them from anywhere: with or without the interpreter lock, and in the middle of raising an
exception. A Python function behind a `ctypes` callback would lose that exception, so these few instructions
are compiled. Each memory block refers to a Python object through its `manager_ctx`; letting go of the block
means dropping that reference with the pending exception put aside.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple


class Callbacks(NamedTuple):
    """Addresses of C functions, valid until the process ends."""

    deleter: int
    """`void (*)(managed tensor *)`: drops the reference held in `manager_ctx`."""
    destructor: int
    """`void (*)(PyObject *capsule)`: calls the deleter unless a consumer has taken the capsule over."""


@cache
def callbacks(capsule_name: bytes, context_offset: int) -> Callbacks:
    """Compile the two functions for one kind of managed tensor.

    Args:
        capsule_name: the name of a capsule that nobody has consumed.
        context_offset: where the structure holds `manager_ctx`, in bytes.
    """
    import llvmlite.binding as llvm
    from llvmlite import ir

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name = ctypes.create_string_buffer(capsule_name)
    module = ir.Module("dlpack")
    deleter = _build_deleter(ir, module, context_offset)
    _build_destructor(ir, module, deleter, ctypes.addressof(name))
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    # Consumers may call the functions while the interpreter shuts down: they are never unloaded.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object((engine, name)))
    return Callbacks(engine.get_function_address("deleter"), engine.get_function_address("destructor"))


def _build_deleter(ir: Any, module: Any, context_offset: int) -> Any:
    """`if (Py_IsInitialized()) { <lock; put the exception aside; drop the reference; restore both> }`."""
    word, int32, void = ir.IntType(64), ir.IntType(32), ir.VoidType()
    function = ir.Function(module, ir.FunctionType(void, [word]), "deleter")
    builder = ir.IRBuilder(function.append_basic_block())
    call = _Caller(ir, builder)
    running = builder.icmp_signed("!=", call("Py_IsInitialized", int32), int32(0))
    with builder.if_then(running):
        state = call("PyGILState_Ensure", int32)
        pending = [builder.alloca(word) for _ in range(3)]
        call("PyErr_Fetch", void, *(builder.ptrtoint(slot, word) for slot in pending))
        context_address = builder.add(function.args[0], word(context_offset))
        context = builder.load(builder.inttoptr(context_address, word.as_pointer()))
        call("Py_DecRef", void, context)
        call("PyErr_Restore", void, *(builder.load(slot) for slot in pending))
        call("PyGILState_Release", void, state)
    builder.ret_void()
    return function


def _build_destructor(ir: Any, module: Any, deleter: Any, name_address: int) -> None:
    """`if (PyCapsule_IsValid(capsule, name)) deleter(PyCapsule_GetPointer(capsule, name));`."""
    word, int32, void = ir.IntType(64), ir.IntType(32), ir.VoidType()
    function = ir.Function(module, ir.FunctionType(void, [word]), "destructor")
    builder = ir.IRBuilder(function.append_basic_block())
    call = _Caller(ir, builder)
    capsule, name = function.args[0], word(name_address)
    untaken = builder.icmp_signed("!=", call("PyCapsule_IsValid", int32, capsule, name), int32(0))
    with builder.if_then(untaken):
        builder.call(deleter, [call("PyCapsule_GetPointer", word, capsule, name)])
    builder.ret_void()


class _Caller:
    """Emits calls of functions of the Python C API by their addresses."""

    def __init__(self, ir: Any, builder: Any) -> None:
        self.ir = ir
        self.builder = builder

    def __call__(self, name: str, result: Any, *args: Any) -> Any:
        address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
        signature = self.ir.FunctionType(result, [arg.type for arg in args])
        target = self.builder.inttoptr(self.ir.IntType(64)(address), signature.as_pointer())
        return self.builder.call(target, args)
