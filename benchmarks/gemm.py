"""Checks and times every tiling of the matrix product for Hopper, and writes the table of the best ones.

Shapes are those of the linear layers of common models. Each product is captured many times into one graph,
over several copies of the weights, so that they come from memory and not from the cache; the best of the
tilings is then timed in turns with `torch.mm` (cuBLAS), if PyTorch is there. It takes a few minutes.

    python benchmarks/gemm.py [--only check|tune] [--models llama-3.1-8b] [--rows 64 8192] [--table TABLE]
                              [--json results.json]

The table that is used is `src/kuiperllm/ops/linear/gemm_table.json`; `--table default` writes it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kuiperllm.backends.cuda.launch import chip, compile_all
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.linear import LinearWeight, gemm_hopper
from kuiperllm.ops.linear.gemm_tiling import ACCUMULATE, PLAIN, ROWS, SWIGLU, Tiling, all_tilings, candidates
from machine import write_results

TABLE = Path(gemm_hopper.__file__).with_name("gemm_table.json")
EPILOGUES = {PLAIN: "plain", ACCUMULATE: "accumulate", SWIGLU: "swiglu"}
BF16 = DType.bfloat16

MODELS = {
    "llama-3.1-8b": (4096, 6144, 4096, 14336, 128256),
    "llama-3.2-1b": (2048, 3072, 2048, 8192, 128256),
    "qwen2.5-0.5b": (896, 1152, 896, 4864, 151936),
    "qwen3-0.6b": (1024, 4096, 2048, 3072, 151936),
}
"""Hidden size, rows of qkv, columns of the output projection, size of the feed-forward layer, vocabulary."""

CHECKED = ((1, 256, 512), (13, 1152, 1024), (100, 832, 576), (257, 1344, 1024), (130, 320, 8192))
"""M, N and K that no tile divides."""

MOST_CANDIDATES = 12
WORST_PROMISE = 2.6
"""Tilings are tried if their estimate is within this factor of the best one's."""

ROTATED_BYTES = 300 << 20
SAMPLE_S = 3e-3
FLOPS, BYTES_PER_S = 700e12, 4.2e12
"""What a product is expected to reach, to choose how often it runs in a sample."""


def shapes(models: Iterable[str]) -> Iterator[tuple[int, int]]:
    """[N, K] of the weights, each once."""
    seen = set()
    for model in models:
        hidden, qkv, heads, feed_forward, words = MODELS[model]
        layers = (qkv, hidden), (hidden, heads), (2 * feed_forward, hidden), (hidden, feed_forward)
        for shape in (*layers, (words, hidden)):
            if shape not in seen:
                seen.add(shape)
                yield shape


# --- right results ----------------------------------------------------------------------------------------


def check(device: Device) -> int:
    """Compare every tiling with a float32 product, poisoned results first, and with itself; how many fail."""
    rng = np.random.default_rng(int(time.time()))
    multiprocessors = chip(device).multiprocessors
    bad: set[str] = set()
    count, largest = 0, 0.0
    for m, n, k in CHECKED:
        x = rng.standard_normal((m, k), np.float32).astype(BF16.numpy)
        w = (rng.standard_normal((n, k), np.float32) * np.float32(k**-0.5)).astype(BF16.numpy)
        bias = rng.standard_normal(n, np.float32)
        old = rng.standard_normal((m, n), np.float32).astype(BF16.numpy)
        product = x.astype(np.float32) @ w.astype(np.float32).T + bias
        gate, up = product[:, : n // 2], product[:, n // 2 :]
        truth = {
            PLAIN: product,
            ACCUMULATE: product + old.astype(np.float32),
            SWIGLU: gate / (1 + np.exp(-gate)) * up,
        }
        on_device = Tensor.from_numpy(x).to(device), LinearWeight.pack(w, bias, device=device)
        before = Tensor.from_numpy(old).to(device)
        for tiling in all_tilings():
            for epilogue, out_dtype in (
                (PLAIN, BF16),
                (ACCUMULATE, BF16),
                (SWIGLU, BF16),
                (PLAIN, DType.float32),
            ):
                if not tiling.fits(m, n, k, epilogue, out_dtype is not BF16, multiprocessors):
                    continue
                found = []
                for _ in "ab":
                    out = Tensor.full(truth[epilogue].shape, math.nan, out_dtype, device)
                    if epilogue == ACCUMULATE:
                        out.copy_(before)
                    gemm_hopper.gemm(*on_device, out, epilogue, tiling)
                    found.append(out.numpy())
                difference = found[0].astype(np.float32) - truth[epilogue]
                error = float(np.linalg.norm(difference) / np.linalg.norm(truth[epilogue]))
                same = found[0].tobytes() == found[1].tobytes()
                count += 1
                largest = max(largest, error if math.isfinite(error) else math.inf)
                if not error < 1e-2 or not same:
                    bad.add(str(tiling))
                    what = f"{tiling} {EPILOGUES[epilogue]} {out_dtype} at M, N, K = {m}, {n}, {k}"
                    print(
                        f"  WRONG: {what}: error {error:.1e}, {'' if same else 'not '}repeatable", flush=True
                    )
    print(f"check: {count} products of {len(all_tilings())} tilings, largest relative error {largest:.1e}, "
          f"{len(bad)} tilings are wrong: {' '.join(sorted(bad)) or '-'}", flush=True)  # fmt: skip
    return len(bad)


def prepare(device: Device, options: argparse.Namespace) -> None:
    """Compile what will be needed, on all processors."""
    started = time.perf_counter()
    kernels = []
    for tiling in all_tilings():
        if options.only != "check":
            kernels.append(gemm_hopper.kernel(tiling, BF16, BF16, PLAIN, False, False))
        if options.only != "tune":
            for epilogue, direct in ((PLAIN, False), (ACCUMULATE, False), (SWIGLU, False), (PLAIN, True)):
                if tiling.fits(1024, 1024, 1024, epilogue, direct, 132):
                    out = DType.float32 if direct else BF16
                    kernels.append(gemm_hopper.kernel(tiling, BF16, out, epilogue, direct, True))
    compiled = compile_all(kernels, device)
    print(
        f"compiled {compiled} of {len(kernels)} kernels in {time.perf_counter() - started:.1f} s", flush=True
    )


# --- fast results -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    n: int
    k: int
    m: int
    tiling: str
    us: float
    cublas_us: float | None
    tflops: float
    weight_gb_per_s: float
    ranking: list[tuple[str, float]]
    """Tilings and their microseconds, best first."""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as cuBLAS."""
        return None if self.cublas_us is None else self.cublas_us / self.us


Replay = Callable[[], float]
"""Run a captured sample; microseconds of a product."""


class Operands:
    """Copies of the weights of a shape, and x and results for them."""

    def __init__(self, device: Device, noise: Tensor, m: int, n: int, k: int) -> None:
        self.device, self.m, self.n, self.k = device, m, n, k
        count = min(40, max(2, math.ceil(ROTATED_BYTES / (n * k * 2))))
        self.weights = [LinearWeight.empty(DType.bfloat16, n, k, device=device) for _ in range(count)]
        self.xs = [
            Tensor.empty((m, k), BF16, device) for _ in range(count if m * (n + k) * count < 2 << 30 else 2)
        ]
        self.outs = [Tensor.empty((m, n), BF16, device) for _ in self.xs]
        for weight in self.weights:
            _fill(Tensor(weight.data.buffer, BF16, (n * k,), offset=weight.data.offset), noise)
        for x in self.xs:
            _fill(x.reshape(m * k), noise)
        once = max(2e-6, 2 * m * n * k / FLOPS, 2 * (n * k + m * k + m * n) / BYTES_PER_S)
        calls = max(2, min(400, int(SAMPLE_S / once)))
        self.calls = math.ceil(calls / count) * count if calls > count else calls

    def ours(self, tiling: Tiling) -> Replay:
        """A sample of our kernel."""

        def run(calls: int) -> None:
            for i in range(calls):
                j = i % len(self.xs)
                gemm_hopper.gemm(self.xs[j], self.weights[i % len(self.weights)], self.outs[j], PLAIN, tiling)

        run(1)
        with self.device.capture() as graph:
            run(self.calls)
        backend: Any = self.device.backend

        def replay() -> float:
            start = backend.record(timing=True)
            graph.replay()
            return float(backend.record(timing=True).ms_since(start)) * 1e3 / self.calls

        replay()
        return replay

    def theirs(self, torch: Any) -> Replay:
        """A sample of `torch.mm`."""

        def normal(rows: int, columns: int) -> Any:
            return torch.empty((rows, columns), dtype=torch.bfloat16, device="cuda").normal_(std=0.125)

        weights = [normal(self.n, self.k).t() for _ in self.weights]
        xs, outs = ([normal(self.m, columns) for _ in self.xs] for columns in (self.k, self.n))

        def run(calls: int) -> None:
            for i in range(calls):
                torch.mm(xs[i % len(xs)], weights[i % len(weights)], out=outs[i % len(xs)])

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run(1)
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                run(self.calls)

        def replay() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / self.calls

        replay()
        return replay


def _fill(values: Tensor, noise: Tensor) -> None:
    size = noise.numel
    for start in range(0, values.numel, size):
        part = values[start : start + size]
        part.copy_(noise[: part.numel])


def tune(
    device: Device, wanted: Iterable[tuple[int, int]], rows: Iterable[int], most: int, torch: Any
) -> list[Result]:
    """Time the `most` promising tilings of every shape, and the best one against cuBLAS."""
    rng = np.random.default_rng(1)
    noise = (rng.standard_normal((1 << 23) - 8, np.float32) / 8).astype(BF16.numpy)
    on_device = Tensor.from_numpy(noise).to(device)
    multiprocessors = chip(device).multiprocessors
    results = []
    for n, k in wanted:
        for m in rows:
            operands = Operands(device, on_device, m, n, k)
            promising = candidates(m, n, k, multiprocessors)
            best = promising[0].estimate(m, n, k, multiprocessors)
            tried = [t for t in promising if t.estimate(m, n, k, multiprocessors) <= WORST_PROMISE * best]
            ranking = []
            for tiling in tried[:most]:
                replay = operands.ours(tiling)
                ranking.append((min(replay(), replay()), str(tiling)))
            ranking.sort()
            results.append(_against_cublas(operands, ranking, torch))
            print(_line(results[-1]), flush=True)
            del operands
            device.synchronize()
            device.allocator.empty_cache()
            if torch is not None:
                torch.cuda.empty_cache()
    return results


def _against_cublas(operands: Operands, ranking: list[tuple[float, str]], torch: Any) -> Result:
    ours = operands.ours(Tiling.parse(ranking[0][1]))
    theirs = operands.theirs(torch) if torch is not None else None
    our_times, their_times = [], []
    for _ in range(7):
        our_times.append(ours())
        if theirs is not None:
            their_times.append(theirs())
    us, m, n, k = median(our_times), operands.m, operands.n, operands.k
    return Result(
        n, k, m, ranking[0][1], us, median(their_times) if their_times else None, 2e-6 * m * n * k / us,
        2e-3 * n * k / us, [(name, time) for time, name in ranking],
    )  # fmt: skip


def _line(r: Result) -> str:
    cublas = "" if r.ratio is None else f" | cuBLAS {r.cublas_us:8.1f} us, ratio {r.ratio:.3f}"
    speed = f"{r.us:8.1f} us {r.tflops:6.1f} TFLOPS {r.weight_gb_per_s:6.0f} GB/s"
    return f"{r.n:6} {r.k:5} {r.m:5} | {speed}{cublas} | {r.tiling}"


def summarize(results: list[Result]) -> None:
    """The ratios to cuBLAS by rows of x, and the worst shape."""
    for m in sorted({r.m for r in results}):
        ratios = [r.ratio for r in results if r.m == m and r.ratio is not None]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"M = {m:5}: geometric mean {mean:.3f} of cuBLAS, least {min(ratios):.3f}")
    print(f"tilings in use: {', '.join(sorted({r.tiling for r in results}))}")


def best_tilings(result: Result) -> list[str]:
    """The best tiling, and the next best for each epilogue that it does not fit."""
    chosen: list[str] = []
    for epilogue in EPILOGUES:
        for direct in (False, True):
            if any(_fits(name, result, epilogue, direct) for name in chosen):
                continue
            fitting = (name for name, _ in result.ranking if _fits(name, result, epilogue, direct))
            chosen += [name for name in [next(fitting, None)] if name is not None]
    return chosen


def _fits(name: str, r: Result, epilogue: int, direct: bool) -> bool:
    return Tiling.parse(name).fits(r.m, r.n, r.k, epilogue, direct, 132)


def write_table(path: Path, results: list[Result], device: Device) -> None:
    """The table as `gemm_tiling.table` reads it; what an older one of the same chip knows besides stays."""
    best: dict[str, dict[str, list[str]]] = {}
    if path.exists() and (older := json.loads(path.read_text()))["chip"] == chip(device).name:
        best = older["best"]
    for r in results:
        best.setdefault(f"{r.n}x{r.k}", {})[str(r.m)] = best_tilings(r)
    best = {shape: dict(sorted(rows.items(), key=lambda row: int(row[0]))) for shape, rows in best.items()}
    lines = ",\n".join(f"  {json.dumps(shape)}: {json.dumps(by_rows)}" for shape, by_rows in best.items())
    path.write_text(f'{{"chip": {json.dumps(chip(device).name)}, "best": {{\n{lines}\n}}}}\n')


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", choices=("check", "tune"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--table", help="write the best tilings to this file; default: the one that is used")
    parser.add_argument("--most", type=int, default=MOST_CANDIDATES, help="tilings to try for a product")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    options = parser.parse_args()
    device = Device(options.device)
    if not chip(device).is_hopper:
        parser.error(f"{chip(device).name} is no Hopper GPU")
    started = time.perf_counter()
    prepare(device, options)
    failed = check(device) if options.only != "tune" else 0
    print(f"{time.perf_counter() - started:.0f} s so far", flush=True)
    if options.only != "check":
        results = tune(device, shapes(options.models), options.rows, options.most, _torch())
        summarize(results)
        if options.table:
            write_table(TABLE if options.table == "default" else Path(options.table), results, device)
        if options.json:
            write_results(options.json, device, [asdict(result) for result in results])
    print(f"{time.perf_counter() - started:.0f} s in all", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
