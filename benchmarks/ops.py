"""Times every operator against its floor: the bytes it must move, at the bandwidth that the memory has.

The shapes are the cases marked `benchmark` in each operator's package, so an operator or a back end that is
added needs nothing here. A case is captured once and replayed, which is how decoding runs it; `eager` is the
same call from Python, allocation and checks included. What fits into a cache can beat the floor.

    python benchmarks/ops.py [--device cpu] [--threads N] [--only rms_norm] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from kuiperllm.core import Device, Tensor
from kuiperllm.ops.cases import Case, all_cases
from machine import OtherLoad, processor

CALLS_PER_GRAPH = 8
SAMPLES = 25
SECONDS_PER_SAMPLE = 0.005


@dataclass(frozen=True)
class Result:
    case: str
    us: float
    eager_us: float
    kilobytes: float
    floor_us: float
    gigabytes_per_s: float
    other_load: float
    """Processors kept busy by other programs meanwhile."""


def seconds_per_call(call: object, device: Device) -> float:
    """The median of some samples, each long enough for the clock."""
    assert callable(call)

    def sample(repeats: int) -> float:
        started = perf_counter()
        for _ in range(repeats):
            call()
        device.synchronize()
        return (perf_counter() - started) / repeats

    sample(1)
    repeats = max(1, math.ceil(SECONDS_PER_SAMPLE / sample(3)))
    return median(sample(repeats) for _ in range(SAMPLES))


def measure(case: Case, device: Device, bandwidth: float) -> Result:
    tensors = case.tensors(case.arguments(), device)
    found = case.run(tensors)
    touched = {id(t): t.nbytes for t in (*tensors.values(), *found) if isinstance(t, Tensor)}
    nbytes = sum(touched.values()) + sum(tensors[name].nbytes for name in case.writes)
    with device.capture() as graph:
        for _ in range(CALLS_PER_GRAPH):
            case.run(tensors)
    load = OtherLoad([])
    seconds = seconds_per_call(graph.replay, device) / CALLS_PER_GRAPH
    eager = seconds_per_call(lambda: case.run(tensors), device)
    return Result(
        case.id, seconds * 1e6, eager * 1e6, nbytes / 1e3, nbytes / bandwidth * 1e6, nbytes / seconds / 1e9,
        load.restart(),
    )  # fmt: skip


def show(results: list[Result], title: str) -> None:
    table = Table(title=title)
    table.add_column("operator and case")
    for name in ("µs", "eager µs", "kB", "floor µs", "x floor", "GB/s", "other load"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.case, f"{r.us:.2f}", f"{r.eager_us:.1f}", f"{r.kilobytes:.0f}", f"{r.floor_us:.2f}",
            f"{r.us / r.floor_us:.2f}", f"{r.gigabytes_per_s:.1f}", f"{r.other_load:.1f}",
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU back end")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    device = Device(options.device)
    if options.threads:
        device.backend.set_num_threads(options.threads)
    bandwidth = device.backend.read_bandwidth()
    cases = [case for case in all_cases() if case.benchmark and options.only in case.id]
    results = [measure(case, device, bandwidth) for case in cases]
    show(results, f"{device}, reads {bandwidth / 1e9:.1f} GB/s")
    if options.json:
        facts = {"device": str(device), "processor": processor(), "read_bytes_per_s": bandwidth}
        document = facts | {"results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
