"""Looks at the machine for `kuiper doctor`, one thing at a time; a failing look is a finding too."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from kuiperllm.config import settings

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
        ("gpu", _gpu),
        ("kernel cache", _kernel_cache),
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


def _gpu() -> Iterator[Finding]:
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        yield Finding("gpu", "none found (nvidia-smi does not run)", facts={"gpus": []})
        return
    gpus = [line.strip() for line in output.splitlines() if line.strip()]
    note = "the CUDA back end is not part of this version"
    yield Finding("gpu", f"{'; '.join(gpus) or 'none'} ({note})", facts={"gpus": gpus})


def _kernel_cache() -> Iterator[Finding]:
    from kuiperllm.backends.cpu.jit import cache_dir
    from kuiperllm.core.memory import format_bytes

    folder = cache_dir()
    sizes = [path.stat().st_size for path in folder.glob("*.o")]
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    facts = {"path": str(folder), "entries": len(sizes), "bytes": sum(sizes), "writable": writable}
    value = f"{folder}: {len(sizes)} kernels, {format_bytes(sum(sizes))}"
    if writable:
        yield Finding("kernel cache", value, facts=facts)
        return
    problem = f"{existing} cannot be written to: kernels are compiled again by every process"
    yield Finding(
        "kernel cache",
        value,
        problem,
        "export KUIPER_CACHE_DIR=FOLDER, one that you can write to",
        facts=facts,
    )


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
    import numpy as np

    from kuiperllm.core import Tensor
    from kuiperllm.ops.add import add

    numbers = np.arange(1024, dtype=np.float32).reshape(4, 256)
    result = add(Tensor.from_numpy(numbers), Tensor.from_numpy(numbers)).numpy()
    right = bool((result == 2 * numbers).all())
    problem = None if right else "a kernel computes wrong numbers; delete the kernel cache"
    yield Finding("self-test", "a kernel ran" if right else "failed", problem, fatal=not right)
