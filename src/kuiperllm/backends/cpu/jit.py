"""Compiles kernels written in Python to machine code, once per processor, and keeps them on disk.

A kernel is a Python function over raw pointers and sizes (see `simd.py` for the vocabulary) that handles
the work items `begin <= i < end`. Numba turns it into LLVM code, LLVM into an object file for the present
`Target`, and the object goes into the user's cache folder under a key made of source, template parameters,
versions and target. A later process maps the object with llvmlite alone: it does not import Numba, and a
kernel is ready in about a millisecond. This mirrors the CUDA back end, where NVRTC makes cubins.

`kernel_cache.py` says what entries survive.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import logging
import re
import struct
import sys
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from kuiperllm.backends import kernel_cache
from kuiperllm.backends.cpu.features import Target, target
from kuiperllm.backends.kernel_cache import Entry
from kuiperllm.config import settings
from kuiperllm.errors import KernelError

log = logging.getLogger(__name__)

# What compiled code may call: LLVM lowers fills and copies to these. Anything else would be unresolved when
# the object is loaded without Numba, and LLVM ends the process over that.
_ALLOWED_SYMBOLS = frozenset({"memset", "memcpy", "memmove", "sched_yield"})

# These become calls of the C library, the second set on x86 before SSE4.1.
_LIBRARY = re.compile(r"a?(sin|cos|tan)h?|atan2|exp(2|10)?|log(2|10)?|powi?")
_ROUNDING = re.compile(r"ceil|floor|nearbyint|rint|round(even)?|trunc")

# What kernel modules are written in.
_VOCABULARY = ("vectors", "simd", "rowwise", "amx", "atomics", "unroll", "compiler")

# How a kernel module imports another one.
_IMPORTED_KERNELS = re.compile(r"^from (kuiperllm\.[\w.]*_kernel) import", re.MULTILINE)

_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
_RESULT = ctypes.addressof(_RESULT_MEMORY := ctypes.create_string_buffer(64))  # void, written and ignored

_compile_lock = threading.Lock()


class Kernel:
    """A kernel by the module and name of its Python function, with values for its template parameters.

    `parameters` replace module-level constants of the same names in the kernel's module. Making a `Kernel`
    is cheap: nothing is compiled, loaded or imported before `address` or `pack` is first used.
    """

    __slots__ = ("_address", "_function", "_lock", "_packer", "module", "name", "parameters")

    def __init__(self, module: str, name: str, **parameters: int | bool) -> None:
        self.module = module
        self.name = name
        self.parameters = parameters
        self._address = 0
        self._function: Any = None
        self._packer: struct.Struct | None = None
        self._lock = threading.Lock()

    @property
    def address(self) -> int:
        """Address of the machine code, `int (void*, void*, int64_t *args, int64_t begin, end, thread)`."""
        return self._address or self._load()

    def pack(self, *args: int | float) -> bytes:
        """The arguments as the kernel reads them: one 8-byte slot each."""
        return self._slots().pack(*args)

    def pack_into(self, memory: Any, *args: int | float) -> None:
        """Write the arguments to a ctypes buffer."""
        self._slots().pack_into(memory, 0, *args)

    def call(self, arguments: int, items: int) -> None:
        """Run all items on the calling thread, with packed arguments at this address."""
        if self._function is None:
            self._function = _SIGNATURE(self.address)
        self._function(_RESULT, _RESULT, arguments, 0, items, 0)

    def call_with(self, *args: int | float) -> None:
        """Run a kernel that has no work items on the calling thread."""
        memory = ctypes.create_string_buffer(self.pack(*args))
        self.call(ctypes.addressof(memory), 0)

    def _slots(self) -> struct.Struct:
        if self._packer is None:
            self._load()
        assert self._packer is not None
        return self._packer

    def _load(self) -> int:
        with self._lock:
            if not self._address:
                symbol, slots, code = _cached_object(self)
                self._packer = struct.Struct("<" + slots)
                self._address = _engine().add(symbol, code)
        return self._address

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"Kernel({self.name}{', ' if inside else ''}{inside})"


# --- the disk cache ---------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where the CPU kernels of this user are kept."""
    return settings().cache_dir / "cpu"


def _cached_object(kernel: Kernel) -> tuple[str, str, bytes]:
    """(symbol, slot format, object code), from the cache or compiled into it."""
    digest = _key(kernel, target())
    symbol = f"kuiper_{kernel.name}_{digest[:16]}"
    path = cache_dir() / f"{kernel.name}-{digest[:32]}.o"
    entry = kernel_cache.read_entry(path, digest)
    if entry is not None:
        return symbol, *entry
    kernel_cache.announce(kernel.name)
    log.info("compiling %s for %s (%s)", kernel, target().level, target().cpu)
    with _compile_lock:
        from kuiperllm.backends.cpu.compiler import compile_kernel

        slots, code = compile_kernel(kernel.module, kernel.name, kernel.parameters, symbol, target())
    kernel_cache.write_entry(path, digest, Entry(slots, code))
    return symbol, slots, code


def _key(kernel: Kernel, where: Target) -> str:
    facts = (
        kernel.module,
        kernel.name,
        sorted(kernel.parameters.items()),
        where,
        _source_digest(kernel.module),
        _toolchain(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@cache
def _source_digest(module: str) -> str:
    """Digest of a kernel module, of those it imports, and of the vocabulary they are written in."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    sources: dict[str, bytes] = {}
    _collect_sources(module, sources)
    for source in sources.values():
        digest.update(source)
    for name in _VOCABULARY:
        digest.update((here / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _collect_sources(module: str, sources: dict[str, bytes]) -> None:
    """Add the source of a kernel module, and of the kernel modules that it imports."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise KernelError(f"kernel module {module} is not installed")
    sources[module] = Path(spec.origin).read_bytes()
    for imported in _IMPORTED_KERNELS.findall(sources[module].decode()):
        if imported not in sources:
            _collect_sources(imported, sources)


@lru_cache(maxsize=1)
def _toolchain() -> tuple[str, ...]:
    versions = (importlib.metadata.version(name) for name in ("numba", "llvmlite"))
    return (sys.implementation.cache_tag, sys.platform, *versions)


# --- loading ----------------------------------------------------------------------------------------------


class _Engine:
    """LLVM's in-process linker: maps object code into executable memory. Lives as long as the process."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        initialize_llvm()
        self._llvm = llvm
        self._lock = threading.Lock()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine(target()))

    def add(self, symbol: str, code: bytes) -> int:
        with self._lock:
            self._engine.add_object_file(self._llvm.ObjectFileRef.from_data(code))
            self._engine.finalize_object()
            address = int(self._engine.get_function_address(symbol))
        if not address:
            raise KernelError(f"compiled kernel lacks the symbol {symbol}; delete {cache_dir()}")
        return address


@lru_cache(maxsize=1)
def _engine() -> _Engine:
    return _Engine()


@lru_cache(maxsize=1)
def initialize_llvm() -> None:
    """Make LLVM's code generator for this machine ready."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def target_machine(where: Target) -> Any:
    """LLVM's code generator for a target."""
    import llvmlite.binding as llvm

    native = llvm.Target.from_triple(llvm.get_process_triple())
    return native.create_target_machine(
        cpu=where.cpu, features=where.features, opt=3, codemodel="jitdefault", jit=True
    )


def check_symbols(ir: str, kernel: str, where: Target) -> None:
    """Raise `KernelError` if LLVM code calls anything that is not there when it is loaded on its own."""
    foreign = []
    for symbol in re.findall(r"^declare [^@]*@\"?([^\"(\s]+)", ir, re.MULTILINE):
        name = symbol.removeprefix("llvm.").partition(".")[0]
        if symbol.startswith("llvm."):
            allowed = not _LIBRARY.fullmatch(name) and (where.has_fma or not _ROUNDING.fullmatch(name))
        else:
            allowed = symbol in _ALLOWED_SYMBOLS
        if not allowed:
            foreign.append(name)
    if foreign:
        raise KernelError(f"kernel {kernel} calls {', '.join(foreign)}, which compiled kernels may not")
