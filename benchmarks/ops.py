"""Times every operator against its floor: the bytes that it must move, at the bandwidth that the memory has,
or the operations of its matrix products, at the rate of a large product; whichever takes longer.

The shapes are the cases marked `benchmark` in each operator's package, so an operator or a back end that is
added needs nothing here. A case is captured once and replayed, which is how decoding runs it; `eager` is the
same call from Python, allocation and checks included. What fits into a cache can beat the floor.

    python benchmarks/ops.py [--device cuda:0] [--dtype bfloat16] [--only rms_norm] [--json results.json]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import KernelError
from kuiperllm.ops.attention import LayerCache
from kuiperllm.ops.cases import Case, all_cases
from kuiperllm.ops.dispatch import implementation
from kuiperllm.ops.linear import LinearWeight, linear
from machine import OtherLoad, processor, write_results

CALLS_PER_GRAPH = 8
SAMPLES = 25
SECONDS_PER_SAMPLE = 0.005


@dataclass(frozen=True)
class Result:
    case: str
    us: float
    eager_us: float
    kilobytes: float
    megaoperations: float
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


def operations_per_s(device: Device, dtype: DType) -> float:
    """The rate of a large product of such activations with weights of the type that suits them best."""
    tokens, n, k = (256, 2048, 2048) if device.is_host else (4096, 4096, 4096)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))
    kind = DType.bfloat16 if dtype is DType.float32 and device.is_host else dtype
    weight = LinearWeight.pack(weights.astype(kind.numpy), device=device)
    x = Tensor.from_numpy(rng.standard_normal((tokens, k), np.float32).astype(dtype.numpy)).to(device)
    out = Tensor.empty((tokens, n), dtype, device)
    return 2 * tokens * n * k / seconds_per_call(lambda: linear(x, weight, out=out), device)


def takes(case: Case, device: Device, dtype: DType) -> bool:
    """Whether the device has kernels for the case with such activations."""
    try:
        implementation(case.function.__module__.rpartition(".")[2], device, dtype)
    except KernelError:
        return False
    return dtype in case.dtypes


def measure(case: Case, device: Device, dtype: DType, bandwidth: float, rate: float) -> Result:
    tensors = case.tensors(case.arguments(dtype=dtype), device)
    found = case.run(tensors)
    sized = (Tensor, LinearWeight, LayerCache)
    touched = {id(t): t.nbytes for t in (*tensors.values(), *found) if isinstance(t, sized)}
    nbytes = sum(touched.values()) + sum(tensors[name].nbytes for name in case.writes)
    with device.capture() as graph:
        for _ in range(CALLS_PER_GRAPH):
            case.run(tensors)
    load = OtherLoad([])
    seconds = seconds_per_call(graph.replay, device) / CALLS_PER_GRAPH
    eager = seconds_per_call(lambda: case.run(tensors), device)
    floor = max(nbytes / bandwidth, case.operations / rate)
    return Result(
        case.id, seconds * 1e6, eager * 1e6, nbytes / 1e3, case.operations / 1e6, floor * 1e6,
        nbytes / seconds / 1e9, load.restart(),
    )  # fmt: skip


def show(results: list[Result], title: str) -> None:
    table = Table(title=title)
    table.add_column("operator and case")
    for name in ("µs", "eager µs", "kB", "Mop", "floor µs", "x floor", "GB/s", "other load"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.case, f"{r.us:.2f}", f"{r.eager_us:.1f}", f"{r.kilobytes:.0f}", f"{r.megaoperations:.0f}",
            f"{r.floor_us:.2f}",
            f"{r.us / r.floor_us:.2f}", f"{r.gigabytes_per_s:.1f}", f"{r.other_load:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of activations")
    parser.add_argument("--threads", type=int, help="threads of the CPU back end")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    device = Device(options.device)
    if options.threads:
        device.backend.set_num_threads(options.threads)
    dtype = DType(options.dtype or ("float32" if device.is_host else "bfloat16"))
    bandwidth, rate = device.backend.read_bandwidth(), operations_per_s(device, dtype)
    results = []
    for case in all_cases():
        kind = dtype if case.activations else DType.float32
        if case.benchmark and options.only in case.id and takes(case, device, kind):
            results.append(measure(case, device, kind, bandwidth, rate))
    ceilings = f"reads {bandwidth / 1e9:.1f} GB/s, multiplies at {rate / 1e12:.2f} TFLOPS"
    show(results, f"{device}, {dtype} activations; {ceilings}")
    if options.json:
        facts = {"device": str(device), "processor": processor(), "activations": str(dtype)}
        facts |= {"read_bytes_per_s": bandwidth, "operations_per_s": rate}
        write_results(options.json, device, [asdict(result) for result in results], **facts)


if __name__ == "__main__":
    main()
