"""Compiles kernels written in CUDA C++ for the present chip, once, and keeps them on disk.

A binary is kept under a key made of the whole text, template parameters included, the compiler's options and
version, and the chip. A later process reads it back and needs no compiler: a kernel is ready in about a
millisecond. See `kernel_cache.py` for what entries survive. This mirrors the CPU back end, where LLVM makes
object files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

from kuiperllm.backends import cuda, kernel_cache
from kuiperllm.backends.cuda.driver import Compiler, Resources
from kuiperllm.backends.cuda.sources import Parameter, definitions, expand, isolate, label
from kuiperllm.backends.kernel_cache import Entry
from kuiperllm.config import settings

log = logging.getLogger(__name__)

_REPORT = re.compile(
    r"Function properties for (?P<name>\w+)\s+(?:ptxas\s+\.\s+)?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Kernel:
    """A kernel by source file and name, with values for its template parameters.

    Making one is cheap: nothing is read or compiled before it is launched. Two with the same facts are equal.

    Args:
        source: the `.cu` file.
        name: the `extern "C" __global__` function in it.
        parameters: macros of the source. A `DType` stands for its C++ type.

    Raises:
        KernelError: a parameter is not upper case, or there is no C++ for its value.
    """

    __slots__ = ("_hash", "defined", "loaded", "name", "source")

    def __init__(self, source: Path, name: str, **parameters: Parameter) -> None:
        self.source = source
        self.name = name
        self.defined = definitions(parameters)
        self.loaded: dict[object, object] = {}
        """What `launch` keeps for each device."""
        self._hash = hash((source, name, self.defined))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kernel):
            return NotImplemented
        return (self.source, self.name, self.defined) == (other.source, other.name, other.defined)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value}" for name, value in self.defined)
        return f"Kernel({self.name}{', ' if inside else ''}{inside})"


# --- the disk cache ---------------------------------------------------------------------------------------

_fresh: dict[str, Entry] = {}
"""What this process compiled, by key: the cache folder may be one that nothing can be kept in."""
_fresh_lock = threading.Lock()


def cache_dir() -> Path:
    """Where the CUDA kernels of this user are kept."""
    return settings().cache_dir / "cuda"


def binary(kernel: Kernel, arch: str) -> Entry:
    """Code of a kernel for a chip, and what the compiler said; from the cache or compiled into it.

    Raises:
        KernelError: the source does not compile; the message quotes the compiler and the line.
        DeviceError: there is no compiler.
    """
    key = _key(kernel, arch)
    entry = _cached(kernel, key)
    if entry is None:
        kernel_cache.announce(kernel.name)
        entry = _compile(kernel, arch, key)
    return entry


def compile_all(
    kernels: Iterable[Kernel], arch: str, progress: Callable[[int, int], None] | None = None
) -> int:
    """Compile the kernels that the cache lacks, on all processors at once.

    NVRTC compiles in as many threads as call it (since 12.3).

    Args:
        kernels: what will be needed.
        arch: the chip.
        progress: called with how many are done, of how many.

    Returns:
        How many had to be compiled.

    Raises:
        KernelError: a source does not compile.
        DeviceError: there is no compiler.
    """
    missing: dict[str, Kernel] = {}
    for kernel in kernels:
        key = _key(kernel, arch)
        if key not in missing and _cached(kernel, key) is None:
            missing[key] = kernel
    if not missing:
        return 0
    workers = min(len(missing), os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="kuiper-nvrtc") as pool:
        jobs = {}
        for key, kernel in missing.items():
            kernel_cache.announce(kernel.name)
            jobs[pool.submit(_compile, kernel, arch, key)] = kernel
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                if progress is not None:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(missing)


def _cached(kernel: Kernel, key: str) -> Entry | None:
    entry = _fresh.get(key)
    return entry if entry is not None else kernel_cache.read_entry(_path(kernel, key), key)


def _path(kernel: Kernel, key: str) -> Path:
    return cache_dir() / f"{kernel.name}-{key[:32]}.cubin"


def _key(kernel: Kernel, arch: str) -> str:
    facts = (expand(kernel.source, kernel.defined), kernel.name, compiler().version, arch)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _compile(kernel: Kernel, arch: str, key: str) -> Entry:
    log.info("compiling %s of %s for %s", kernel, label(kernel.source.resolve()), arch)
    text = isolate(expand(kernel.source, kernel.defined), kernel.name)
    code, remarks = compiler().compile(text, kernel.name, arch)
    if remarks:
        log.debug("%s for %s:\n%s", kernel, arch, remarks)
    entry = Entry(remarks, code)
    with _fresh_lock:
        _fresh[key] = entry
    kernel_cache.write_entry(_path(kernel, key), key, entry)
    return entry


def compiler() -> Compiler:
    """The compiler of this process, opened on first use.

    Raises:
        DeviceError: there is none; the message says what to install.
    """
    return _opened(cuda.platform.open_compiler)


@lru_cache(maxsize=4)
def _opened(open_compiler: Callable[[], Compiler]) -> Compiler:
    return open_compiler()


# --- reports ----------------------------------------------------------------------------------------------


def report(remarks: str, name: str) -> Resources | None:
    """What a kernel takes, from what the assembler said about it; None if it said nothing."""
    for match in _REPORT.finditer(remarks):
        if match["name"] == name:
            shared = re.search(r"(\d+) bytes smem", match["rest"])
            return Resources(
                registers=int(match["registers"]),
                spill_bytes=max(int(match["stack"]), int(match["stores"])),
                shared_bytes=int(shared[1]) if shared else 0,
            )
    return None
