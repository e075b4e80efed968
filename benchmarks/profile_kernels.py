"""Times and counters of the versions of rms_norm and of the GEMV that docs/profiling.md compares.

    python benchmarks/profile_kernels.py [--version gemv-qkv/planned ...] [--json FILE]
    python benchmarks/profile_kernels.py --ncu [--version ...] [--json FILE]
    python benchmarks/profile_kernels.py --list

Times come from graphs that are replayed over more bytes than the cache holds, without any profiler. The floor
is what the bytes that every version must move take at the bandwidth that the memory was measured to have.
With `--ncu`, Nsight Compute then counts a few launches of each version in a process of its own.

To look at one version by hand, with any options of ncu:

    ncu --clock-control none --set full --kernel-name gemv \\
        python benchmarks/profile_kernels.py --launches 1 --version gemv-qkv/planned
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

import ncu
from gemv import UNCACHED_BYTES, Bench
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.backends.cuda.launch import load
from kuiperllm.core import Device
from machine import write_results
from profile_versions import TINY, VERSIONS, Setting, Sizes, Version, Work

LAUNCHES = 3
NCU_SECONDS = 150.0
ANY_BANDWIDTH = 1e12
TINY_BYTES = 1 << 16

Document = dict[str, Any]


@contextmanager
def one_by_one(kernels: Sequence[Kernel], device: Device) -> Iterator[None]:
    """Inside the block these kernels do not overlap with those in front of them."""
    loaded = [load(kernel, device) for kernel in kernels]
    before = [kernel.overlap for kernel in loaded]
    for kernel in loaded:
        kernel.overlap = False
    try:
        yield
    finally:
        for kernel, overlap in zip(loaded, before, strict=True):
            kernel.overlap = overlap


def microseconds(bench: Bench, work: Work) -> float:
    """Of a call, in a graph that goes through all buffers."""

    def all_calls() -> None:
        for index in range(work.calls):
            work.call(index)

    with one_by_one(work.serial, bench.device):
        return bench.ms(all_calls) * 1000 / work.calls


def measure(bench: Bench, chosen: Sequence[Version], works: Sequence[Work]) -> list[Document]:
    """Times, as the JSON file has them; counters are added later."""
    results: list[Document] = []
    for version, work in zip(chosen, works, strict=True):
        results.append(
            {
                "name": version.name,
                "change": version.change,
                "against": version.against and f"{version.example}/{version.against}",
                "predicted": version.predicted,
                "bytes": work.nbytes,
                "floor_us": work.nbytes / bench.bandwidth * 1e6,
                "us": microseconds(bench, work),
                "kernels": [{"name": name, "counters": {}} for name in work.kernels],
            }
        )
    return results


def launch_all(bench: Bench, works: Sequence[Work], launches: int) -> None:
    """What ncu counts: a few calls of each version, in their order, and nothing else."""
    for work in works:
        with one_by_one(work.serial, bench.device):
            for index in range(launches):
                work.call(index)
                bench.device.synchronize()


def add_counters(results: Sequence[Document], launches: Sequence[ncu.Launch], calls: int) -> None:
    """Put medians over the calls of each version where they belong.

    Raises:
        ProfilerError: other kernels were counted than were launched.
    """
    wanted = [kernel["name"] for result in results for _ in range(calls) for kernel in result["kernels"]]
    if [launch.kernel for launch in launches] != wanted:
        raise ncu.ProfilerError(
            f"ncu counted {len(launches)} launches where {len(wanted)} others were expected"
        )
    start = 0
    for result in results:
        kernels = result["kernels"]
        end = start + calls * len(kernels)
        for position, kernel in enumerate(kernels):
            same = [launch.counters for launch in launches[start + position : end : len(kernels)]]
            kernel["counters"] = {name: _median([c.get(name) for c in same]) for name in ncu.METRICS}
        start = end


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def count(profiler: str, options: argparse.Namespace, results: Sequence[Document]) -> None:
    """Start this program again under ncu, and add what it counts."""
    names = [result["name"] for result in results]
    program = [
        sys.executable, __file__, "--device", options.device, "--launches", str(LAUNCHES),
        "--version", *names,
    ]  # fmt: skip
    kernels = [kernel["name"] for result in results for kernel in result["kernels"]]
    if options.tiny:
        program.append("--tiny")
    add_counters(results, ncu.profile(profiler, kernels, program, NCU_SECONDS), LAUNCHES)


def show(results: Sequence[Document]) -> None:
    table = Table()
    table.add_column("version", no_wrap=True)
    for name in ("µs", "floor µs", "x floor", "predicted", "measured", "DRAM %", "long scoreboard"):
        table.add_column(name, justify="right")
    times = {result["name"]: result["us"] for result in results}
    for result in results:
        us, floor, before = result["us"], result["floor_us"], times.get(result["against"])
        counters = result["kernels"][-1]["counters"]
        table.add_row(
            result["name"], f"{us:.2f}", f"{floor:.2f}", f"{us / floor:.2f}",
            _shown(result["predicted"]), _shown(us / before if before else None),
            _shown(counters.get("dram__throughput.avg.pct_of_peak_sustained_elapsed")),
            _shown(counters.get("smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio")),
        )  # fmt: skip
    Console(width=110).print(table)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def commit() -> str:
    """What is checked out, if that can be said."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def selected(names: Sequence[str] | None) -> list[Version]:
    """The versions of these names, in the order of the list; all if there are none."""
    known = {version.name: version for version in VERSIONS}
    if unknown := [name for name in names or () if name not in known]:
        raise SystemExit(f"there is no version {unknown[0]}; --list shows all")
    return [version for version in VERSIONS if not names or version.name in names]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--list", action="store_true", help="print the versions and end")
    parser.add_argument("--version", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--ncu", action="store_true", help="count with Nsight Compute, too")
    parser.add_argument("--launches", type=int, metavar="N", help="only launch each version N times")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see whether everything runs")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.list:
        for version in VERSIONS:
            print(f"{version.name:30} {version.change}")
        return
    chosen = selected(options.version)
    try:
        profiler = ncu.find() if options.ncu else ""
    except ncu.ProfilerError as error:
        raise SystemExit(str(error)) from None
    sizes = TINY if options.tiny else Sizes()
    if options.launches:  # few layers: what ncu saves and restores should be little
        sizes = replace(sizes, model=replace(sizes.model, layers=options.launches))
    bench = Bench(
        Device(options.device),
        ANY_BANDWIDTH if options.tiny or options.launches else None,
        TINY_BYTES if options.tiny else UNCACHED_BYTES,
    )
    setting = Setting(bench, sizes)
    works = [version.build(setting) for version in chosen]

    def call_all() -> None:
        for work in works:
            work.call(0)

    bench.backend.prepare(call_all)
    if options.launches:
        launch_all(bench, works, options.launches)
        return
    results = measure(bench, chosen, works)
    failure = ""
    if options.ncu:
        try:
            count(profiler, options, results)
        except ncu.ProfilerError as error:
            failure = str(error)
    show(results)
    if options.json:
        facts = {
            "read_bytes_per_s": bench.bandwidth,
            "commit": commit(),
            "ncu": ncu.version(profiler) if options.ncu else "",
            "launches": LAUNCHES,
        }
        write_results(options.json, bench.device, results, **facts)
    if failure:
        raise SystemExit(f"times only: {failure}")


if __name__ == "__main__":
    main()
