"""Looks at the machine for `kuiper doctor`, one thing at a time; a failing look is a finding too."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuiperllm.config import settings

if TYPE_CHECKING:
    from kuiperllm.core import Device

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)")
# Packages whose module has another name.
_MODULES = {"ml-dtypes": "ml_dtypes", "huggingface-hub": "huggingface_hub"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    problem: str | None = None
    fix: str | None = None
    """The command, or the setting, that solves the problem."""
    fatal: bool = False
    """Nothing can run as long as the problem is there."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same in figures, for programs."""


def diagnose() -> list[Finding]:
    """Everything there is to say about this machine."""
    looks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("versions", _versions),
        ("packages", _packages),
        ("cpu", _cpu),
        ("threads", _threads),
        ("memory", _memory),
        ("gpu", _gpus),
        ("kernel cache", _kernel_caches),
        ("demo model", _demo_model),
        ("self-test", _self_test),
    )
    findings: list[Finding] = []
    for name, look in looks:
        try:
            findings.extend(look())
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            findings.append(Finding(name, "failed", problem=problem, fatal=True))
    return findings


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    facts = {"kuiperllm": metadata.version("kuiperllm"), "python": python, "system": platform.platform()}
    yield Finding("kuiperllm", facts["kuiperllm"], facts={"version": facts["kuiperllm"]})
    yield Finding("python", f"{python} ({sys.executable})", facts={"version": python})
    yield Finding("system", facts["system"], facts={"machine": platform.machine()})


def _packages() -> Iterator[Finding]:
    """The packages that kuiperllm needs: there, new enough, and importable."""
    for requirement in metadata.requires("kuiperllm") or ():
        match = _REQUIREMENT.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        name, wanted = match[1], match[2]
        fix = shlex.join((sys.executable, "-m", "pip", "install", f"{name}>={wanted}"))
        try:
            version = metadata.version(name)
            importlib.import_module(_MODULES.get(name, name))
        except Exception as error:
            problem = "is not installed" if isinstance(error, metadata.PackageNotFoundError) else str(error)
            yield Finding(name, "missing", problem=problem, fix=fix, fatal=True)
            continue
        facts = {"version": version}
        if _numbers(version) < _numbers(wanted):
            yield Finding(name, version, f"{wanted} or newer is needed", fix, fatal=True, facts=facts)
        else:
            yield Finding(name, version, facts=facts)


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers at the front of a version."""
    return tuple(int(part) for part in re.match(r"[0-9.]*", version)[0].split(".") if part)  # type: ignore[index]


def _cpu() -> Iterator[Finding]:
    from kuiperllm.backends.cpu.features import host_levels, processor_name, target

    levels = host_levels()
    level = target().level
    yield Finding("cpu", processor_name())
    can = ", ".join(levels)
    facts = {"level": level, "host_levels": list(levels)}
    yield Finding("kernels", f"level {level} (this processor can run {can})", facts=facts)


def _threads() -> Iterator[Finding]:
    from kuiperllm.backends.cpu.features import physical_cores

    facts = {
        "threads": settings().num_threads or physical_cores(),
        "physical_cores": physical_cores(),
        "logical_processors": os.cpu_count(),
    }
    value = "{threads} of {physical_cores} physical cores, {logical_processors} logical processors"
    yield Finding("threads", value.format(**facts), facts=facts)


def _memory() -> Iterator[Finding]:
    from kuiperllm.core import Device
    from kuiperllm.core.memory import format_bytes

    info = Device("cpu").memory_info()
    value = f"{format_bytes(info.free_bytes)} free of {format_bytes(info.total_bytes)}"
    yield Finding("memory", value, facts=info._asdict())
    if sys.platform != "linux":
        return
    try:
        setting = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    except OSError:
        setting = None
    mode = setting[1] if setting is not None else "unknown"
    problem, fix = None, None
    if mode == "never":
        problem = "large models run slower on small pages"
        fix = f"echo madvise | sudo tee {_HUGE_PAGES}"
    yield Finding("huge pages", mode, problem, fix, facts={"mode": mode})


def _gpus() -> Iterator[Finding]:
    """The GPUs, what keeps them from being used, and one kernel on the first. The CPU does without them."""
    from kuiperllm.backends.cuda.discovery import MIN_COMPUTE_CAPABILITY, survey
    from kuiperllm.errors import DeviceError

    try:
        driver, gpus = survey()
    except DeviceError as error:
        if not _has_nvidia_hardware():
            yield Finding("gpu", "none found", facts={"gpus": []})
            return
        install = shlex.join((sys.executable, "-m", "pip", "install", "kuiperllm[cuda]"))
        fix = None if _has_gpu_packages() else install
        yield Finding("gpu", "cannot be used", str(error), fix, facts={"gpus": []})
        return
    from kuiperllm.core.memory import format_bytes

    for index, gpu in enumerate(gpus):
        capability = "{}.{}".format(*gpu.compute_capability)
        facts = {**gpu._asdict(), "driver": driver, "device": f"cuda:{index}"}
        value = f"cuda:{index}: {gpu.name}, {format_bytes(gpu.total_bytes)}, compute capability {capability}"
        problem = None
        if gpu.compute_capability < MIN_COMPUTE_CAPABILITY:
            problem = "the chip is too old: compute capability {}.{} is needed".format(
                *MIN_COMPUTE_CAPABILITY
            )
        yield Finding("gpu", f"{value}, driver for CUDA {driver}", problem, facts=facts)
    yield from _gpu_self_test()


def _has_nvidia_hardware() -> bool:
    """Whether there is a sign of a GPU or of its driver."""
    return shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*"))


def _has_gpu_packages() -> bool:
    """Whether the packages of the extra `cuda` are there, the compiler aside."""
    return find_spec("cuda") is not None and all(find_spec(f"cuda.{name}") for name in ("core", "bindings"))


def _gpu_self_test() -> Iterator[Finding]:
    """Compile, or take from the cache, one kernel and run it on the first GPU."""
    from kuiperllm.core import Device
    from kuiperllm.errors import KuiperError

    try:
        right = _adds_on(Device("cuda:0"))
    except KuiperError as error:
        yield Finding("gpu self-test", "failed", str(error))
        return
    problem = None if right else "a kernel computes wrong numbers; delete the kernel cache"
    yield Finding("gpu self-test", "a kernel ran" if right else "failed", problem)


def _kernel_caches() -> Iterator[Finding]:
    """Where compiled kernels are kept, for each back end that has compiled some."""
    from kuiperllm.backends.cpu import jit as cpu
    from kuiperllm.backends.cuda import jit as cuda

    yield _kernel_cache("kernel cache", cpu.cache_dir(), "*.o")
    if cuda.cache_dir().is_dir():
        yield _kernel_cache("gpu kernel cache", cuda.cache_dir(), "*.cubin")


def _kernel_cache(name: str, folder: Path, pattern: str) -> Finding:
    from kuiperllm.core.memory import format_bytes

    sizes = [path.stat().st_size for path in folder.glob(pattern)]
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    facts = {"path": str(folder), "entries": len(sizes), "bytes": sum(sizes), "writable": writable}
    value = f"{folder}: {len(sizes)} kernels, {format_bytes(sum(sizes))}"
    problem, fix = None, None
    if not writable:
        problem = f"{existing} cannot be written to: kernels are compiled again by every process"
        fix = "export KUIPER_CACHE_DIR=FOLDER, one that you can write to"
    return Finding(name, value, problem, fix, facts=facts)


def _demo_model() -> Iterator[Finding]:
    from kuiperllm.core.memory import format_bytes

    path = resources.files("kuiperllm") / "data" / "demo.gguf"
    if not path.is_file():
        fix = shlex.join(
            (sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", "kuiperllm")
        )
        yield Finding("demo model", "missing", "it is not in the package", fix, fatal=True)
        return
    yield Finding("demo model", f"{path}, {format_bytes(Path(str(path)).stat().st_size)}")


def _self_test() -> Iterator[Finding]:
    """Compile, or take from the cache, one kernel and run it."""
    from kuiperllm.core import Device

    right = _adds_on(Device("cpu"))
    problem = None if right else "a kernel computes wrong numbers; delete the kernel cache"
    yield Finding("self-test", "a kernel ran" if right else "failed", problem, fatal=not right)


def _adds_on(device: Device) -> bool:
    """Whether a kernel adds numbers right."""
    import numpy as np

    from kuiperllm.core import Tensor
    from kuiperllm.ops.add import add

    numbers = np.arange(1024, dtype=np.float32).reshape(4, 256)
    x = Tensor.from_numpy(numbers).to(device)
    return bool((add(x, x).numpy() == 2 * numbers).all())
