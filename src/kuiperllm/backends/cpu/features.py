"""What this processor can do, and which level of kernels that allows.

A level is a set of instructions that a kernel may rely on. Every level contains the ones before it:

* `generic`: whatever LLVM makes of vector code; runs on any processor, ARM included
* `avx2`: AVX2, FMA and F16C (x86-64-v3)
* `avx512`: AVX-512 F/BW/DQ/VL with VNNI, the int8 dot product
* `amx`: tile registers for int8 and bfloat16 matrices

An instruction that the processor lacks ends the process without an exception, so the level is decided here,
once, before any kernel is compiled or loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kuiperllm.config import settings
from kuiperllm.errors import UsageError

LEVELS = ("generic", "avx2", "avx512", "amx")

_NEEDS: dict[str, tuple[str, ...]] = {
    "generic": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"),
    "amx": ("amx-tile", "amx-int8", "amx-bf16", "avx512bf16"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """What kernels are compiled for: a level, and LLVM's names of processor and features."""

    level: str
    cpu: str
    features: str
    has_f16c: bool
    has_fma: bool
    has_bf16: bool
    """AVX512_BF16: dot products of bfloat16 pairs."""
    is_x86: bool

    def at_least(self, level: str) -> bool:
        """Whether kernels of `level` may be used."""
        return LEVELS.index(self.level) >= LEVELS.index(level)


@lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """LLVM's names of the features that processor and operating system both offer."""
    import llvmlite.binding as llvm

    return frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)


@lru_cache(maxsize=1)
def host_levels() -> tuple[str, ...]:
    """The levels this host can run, lowest first."""
    levels = []
    for level in LEVELS:
        if not all(feature in host_features() for feature in _NEEDS[level]):
            break
        if level == "amx" and not _request_amx():
            break
        levels.append(level)
    return tuple(levels)


@lru_cache(maxsize=1)
def target() -> Target:
    """The target of this process: the host's best level, or the lower one that KUIPER_CPU_LEVEL asks for.

    Raises:
        UsageError: KUIPER_CPU_LEVEL is unknown, or above what the host can run.
    """
    import llvmlite.binding as llvm

    level = host_levels()[-1]
    wanted = settings().cpu_level
    if wanted is not None:
        if wanted not in LEVELS:
            raise UsageError(f"KUIPER_CPU_LEVEL={wanted!r} is unknown; choose one of {', '.join(LEVELS)}")
        if wanted not in host_levels():
            raise UsageError(
                f"KUIPER_CPU_LEVEL={wanted}: this processor does not have it; it can run "
                f"{', '.join(host_levels())}"
            )
        level = wanted
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    host = host_features()
    at_least = LEVELS.index(level)
    if is_x86 and level in ("generic", "avx2"):
        cpu, features = ("x86-64" if level == "generic" else "x86-64-v3"), ""
    else:
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return Target(
        level=level,
        cpu=cpu,
        features=features,
        has_f16c=not is_x86 or at_least >= LEVELS.index("avx2"),
        has_fma=not is_x86 or at_least >= LEVELS.index("avx2"),
        has_bf16=at_least >= LEVELS.index("avx512") and "avx512bf16" in host,
        is_x86=is_x86,
    )


def _request_amx() -> bool:
    """Ask Linux for leave to use tile registers: once per process, before threads that use them start."""
    if sys.platform != "linux":
        return False
    syscall_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata = 158, 0x1023, 18
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(syscall_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0)


@lru_cache(maxsize=1)
def physical_cores() -> int:
    """Physical cores that this process may use: affinity, hyper-threads and control-group quota respected."""
    if sys.platform == "darwin":
        for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            if (count := _sysctl_int(name)) > 0:
                return count
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), _cgroup_quota()))


def _cgroup_quota() -> int:
    """Whole processors that the control group allows; a large number where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 1 << 20


def _sysctl_int(name: str) -> int:
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    libc = ctypes.CDLL(None)
    ok = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0) == 0
    return value.value if ok else 0


def processor_name() -> str:
    """The processor's name as the operating system gives it, and LLVM's name for its kind."""
    import llvmlite.binding as llvm

    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
        except OSError:
            pass
    return f"{name} ({llvm.get_host_cpu_name()})"
