"""Compiles one kernel with Numba and LLVM. Imported only when the cache has no machine code for it."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from numba import njit, types
from numba.core.errors import NumbaError

from kuiperllm.backends.cpu import jit, simd
from kuiperllm.backends.cpu.features import Target
from kuiperllm.backends.cpu.unroll import specialize
from kuiperllm.backends.cpu.vectors import KINDS, compiling_for
from kuiperllm.errors import KernelError

_ENTRY = """
def entry(args, begin, end, thread):
    body({arguments}, begin, end, thread)
"""

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": {"contract", "reassoc", "nsz"},  # infinities and NaN keep their meaning
    "boundscheck": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


def compile_kernel(
    module: str, name: str, parameters: Mapping[str, int | bool], symbol: str, where: Target
) -> tuple[str, bytes]:
    """Compile `module.name` with these template parameters; its machine code is called `symbol`.

    Returns the struct format of its argument slots (one `q` or `d` each) and the object file.

    Raises:
        KernelError: Numba or LLVM refuse the kernel.
    """
    import llvmlite.binding as llvm

    source = getattr(importlib.import_module(module), name)
    slots, arguments, readers = _slots(source)
    # Without LLVM's scheduler instructions stay in the kernel's order. The scheduler brings loads forward, as
    # processors do by themselves, at the price of registers: tiles of sums would go to memory and back.
    llvm.set_option("kuiper", "--enable-misched=false")
    jit.initialize_llvm()
    machine = jit.target_machine(where)
    with compiling_for(where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            body = njit(**_OPTIONS, forceinline=True)(specialize(source, parameters))
            scope: dict[str, Any] = {"body": body, **readers}
            exec(_ENTRY.format(arguments=arguments), scope)
            signature = types.void(types.CPointer(types.int64), types.int64, types.int64, types.int64)
            entry = njit(signature, **_OPTIONS)(scope["entry"])
        except NumbaError as error:
            raise KernelError(f"kernel {name} does not compile: {error}") from error
        ir = entry.inspect_llvm(entry.signatures[0])
        mangled = entry.overloads[entry.signatures[0]].fndesc.llvm_func_name
    ir = ir.replace(mangled, symbol)
    jit.check_symbols(ir, name, where)
    return slots, machine.emit_object(llvm.parse_assembly(ir))


def _slots(source: Callable[..., None]) -> tuple[str, str, dict[str, Any]]:
    """Struct format, call arguments, and the functions those call, from a kernel's annotations."""
    annotations = inspect.get_annotations(source, eval_str=True)
    names = list(inspect.signature(source).parameters)
    if names[-3:] != ["begin", "end", "thread"]:
        raise KernelError(f"kernel {source.__name__} must end in the parameters begin, end, thread")
    slots, arguments = "", []
    readers: dict[str, Any] = {}
    for index, name in enumerate(names[:-3]):
        kind: Any = annotations.get(name)
        if kind not in KINDS:
            raise KernelError(f"kernel {source.__name__}: parameter {name} needs a type of vectors.KINDS")
        slots += "d" if kind is float else "q"
        arguments.append(f"read_{kind.__name__}(args, {index})")
        readers[f"read_{kind.__name__}"] = simd.slot(kind)
    return slots, ", ".join(arguments), readers
