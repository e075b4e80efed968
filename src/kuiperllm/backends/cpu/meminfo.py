"""How much memory this process may use: the machine's and, on Linux, that of its control groups."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kuiperllm.core.memory import MemoryInfo


def memory_info() -> MemoryInfo:
    """The memory that this process may still take, and the most it could have."""
    if sys.platform == "darwin":
        return darwin_memory_info(_output("sysctl", "-n", "hw.memsize"), _output("vm_stat"))
    return linux_memory_info(Path("/proc"), Path("/sys/fs/cgroup"))


def anonymous_bytes() -> int:
    """The anonymous memory that this process occupies; more than it can have where that is unknown."""
    # proc(5): total size, resident pages, and those of them that belong to files.
    fields = _text(Path("/proc/self/statm")).split()
    return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE if len(fields) > 2 else sys.maxsize


def linux_memory_info(proc: Path, cgroup: Path) -> MemoryInfo:
    """The tightest of the machine's own figures and the limits of the process's control groups.

    Args:
        proc: where procfs is mounted (proc(5): `meminfo`, `self/cgroup`).
        cgroup: where the control groups are mounted, version 2 or, in its folder `memory`, version 1.
    """
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(proc / "meminfo"), re.MULTILINE))
    total = int(fields.get("MemTotal", 0)) * 1024 or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(fields["MemAvailable"]) * 1024 if "MemAvailable" in fields else total
    for limit, used in _cgroup_limits(_text(proc / "self" / "cgroup"), cgroup):
        total = min(total, limit)
        free = min(free, max(limit - used, 0))
    return MemoryInfo(free, total)


def _cgroup_limits(membership: str, root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every memory control group that the process is in.

    `membership` has a line `id:controllers:path` for each hierarchy (cgroups(7)); that of version 2 names no
    controllers. File pages that the kernel may drop are not counted as used.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit_file, used_file, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit_file, used_file = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # Inside a container the path may name a folder outside it; the root is then the container's group.
        relative = Path(path.lstrip("/"))
        for folder in {base / relative, *(base / parent for parent in relative.parents), base}:
            limit, used = _text(folder / limit_file).strip(), _text(folder / used_file).strip()
            if limit.isdecimal() and used.isdecimal():
                stat = re.search(rf"^{cache} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                yield int(limit), int(used) - (int(stat[1]) if stat else 0)


def darwin_memory_info(memsize: str, vm_stat: str) -> MemoryInfo:
    """Figures from the output of `sysctl -n hw.memsize` and of `vm_stat`; 0 if they cannot be read."""
    page_size = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\.", vm_stat, re.MULTILINE)
    total = int(memsize) if memsize.strip().isdecimal() else 0
    free = sum(map(int, pages)) * int(page_size[1]) if page_size else total
    return MemoryInfo(min(free, total), total)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
