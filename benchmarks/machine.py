"""What a benchmark ran on, who else used the processor meanwhile, and files of results that say so."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

from kuiperllm.core import Device
from kuiperllm.engine.bench import versions


def write_results(path: Path, device: Device, results: Sequence[dict[str, Any]], /, **facts: Any) -> None:
    """A file of results with what they hang on: day, chip and versions, and the settings in `facts`."""
    chip = str(device.backend.properties["name"])
    document = {"date": date.today().isoformat(), "chip": chip, "versions": versions(device)}
    path.write_text(json.dumps(document | facts | {"results": list(results)}, indent=1) + "\n")


def processor() -> str:
    """The processor's name and vector features, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    vectors = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx"))]
    model = f"family {fields.get('cpu family')} model {fields.get('model')}"
    return f"{fields.get('model name', platform.machine())}, {model}; {' '.join(vectors)}"


def compiler_version() -> str:
    """The first line that the C++ compiler says about itself."""
    command = [os.environ.get("CXX", "c++"), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


class OtherLoad:
    """Processors kept busy by anything but the given processes and this one; Linux only, else 0.

    A figure is worth what this number is small: spinning threads suffer out of proportion when a neighbour
    takes their processor.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = [os.getpid(), *pids]
        self.available = Path("/proc/stat").exists()
        self.ticks_per_s = os.sysconf("SC_CLK_TCK") if self.available else 1
        self.since = self._now()

    def restart(self) -> float:
        """Processors' worth of foreign work since the last call."""
        now, before = self._now(), self.since
        self.since = now
        return max(0.0, (now[1] - before[1]) / (now[0] - before[0]))

    def _now(self) -> tuple[float, float]:
        """The time, and the foreign processor seconds so far."""
        if not self.available:
            return perf_counter(), 0.0
        total = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in total[:8])
        busy = user + nice + system + irq + softirq + steal
        own = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])  # utime, stime: fields 14 and 15 of proc(5)
        return perf_counter(), (busy - own) / self.ticks_per_s
