"""Nsight Compute (`ncu`): finding it, starting it on a Python program, reading the counters it prints."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sectors_op_read.sum",
    "lts__t_sector_hit_rate.pct",
    "l1tex__t_sector_hit_rate.pct",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__block_size",
    "launch__shared_mem_per_block_dynamic",
)
"""What is asked for; docs/profiling.md says what each means."""

Counters = dict[str, float | None]

_FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*", "/usr/local/cuda/nsight-compute*")
_NO_METRIC = re.compile(r"Failed to find metric (?:regex:)?\^?(\w+)")


class ProfilerError(Exception):
    """Nsight Compute is missing or failed; one line says what to do."""


@dataclass(frozen=True)
class Launch:
    """What was counted during one launch of a kernel."""

    kernel: str
    counters: Counters


def find() -> str:
    """Where `ncu` lies: on PATH, else where installers put it, the newest version first.

    Raises:
        ProfilerError: nowhere.
    """
    found = shutil.which("ncu")
    if found is not None:
        return found
    for pattern in _FOLDERS:
        for path in sorted(Path("/").glob(f"{pattern[1:]}/ncu"), key=_version_of_folder, reverse=True):
            if os.access(path, os.X_OK):
                return str(path)
    places = ", ".join(_FOLDERS)
    raise ProfilerError(f"ncu is not on PATH nor in {places}: install Nsight Compute, or leave out --ncu")


def _version_of_folder(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.parent.name)]


def version(ncu: str) -> str:
    """What it says about itself, such as `2025.3.1.0`; empty if that cannot be made out."""
    done = subprocess.run([ncu, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"Version (\d[\d.]*)", done.stdout)
    return found[1] if found else ""


def command(ncu: str, kernels: Iterable[str], metrics: Iterable[str], log: Path) -> list[str]:
    """How to start `ncu`; what it shall start goes behind."""
    names = "|".join(sorted(set(kernels)))
    return [
        ncu, "--csv", "--log-file", str(log), "--print-units", "base", "--clock-control", "none",
        "--kernel-name", f"regex:^({names})$", "--metrics", ",".join(metrics),
    ]  # fmt: skip


def profile(ncu: str, kernels: Sequence[str], program: Sequence[str], seconds: float) -> list[Launch]:
    """Start a program under `ncu`, again without the metrics that this version or chip does not have.

    Args:
        ncu: as found by `find`.
        kernels: names of the functions that count; others run undisturbed.
        program: what to start, with arguments.
        seconds: that one start may take.

    Raises:
        ProfilerError: it failed, took too long, or counted nothing.
    """
    metrics = list(METRICS)
    while metrics:
        text = _run(ncu, kernels, metrics, program, seconds)
        unknown = tuple(f"{name}." for name in _NO_METRIC.findall(text))
        kept = [name for name in metrics if not f"{name}.".startswith(unknown)]
        if len(kept) == len(metrics):
            return parse(text)
        metrics = kept
    raise ProfilerError("ncu knows none of the metrics that were asked for")


def _run(
    ncu: str, kernels: Sequence[str], metrics: Sequence[str], program: Sequence[str], seconds: float
) -> str:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        process = subprocess.Popen(
            [*command(ncu, kernels, metrics, log), *program],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise ProfilerError(f"ncu was not done after {seconds:.0f} s: choose fewer versions") from None
        text = log.read_text() if log.exists() else ""
    text = f"{text}\n{output}"
    if process.returncode and not _NO_METRIC.search(text):
        raise ProfilerError(_reason(text))
    return text


def _reason(text: str) -> str:
    """The line of ncu, or else of the program, that says what went wrong."""
    if "ERR_NVGPUCTRPERM" in text:
        return "the driver keeps its performance counters for administrators (ERR_NVGPUCTRPERM)"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("==ERROR==")]
    return f"ncu failed: {(errors[:1] or lines[-1:] or ['it says nothing'])[0]}"


def parse(text: str) -> list[Launch]:
    """The launches in a log of `ncu --csv`, in their order: a row for each metric of each launch.

    A value that is not a number (`n/a`, `nan`) becomes None.

    Raises:
        ProfilerError: there is no table.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, Launch] = {}
    for row in csv.DictReader(lines):
        name = row["Kernel Name"].partition("(")[0]
        launch = launches.setdefault(row["ID"], Launch(name, {}))
        launch.counters[row["Metric Name"]] = _number(row["Metric Value"])
    if not launches:
        raise ProfilerError(_reason(text))
    return list(launches.values())


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if isfinite(value) else None
