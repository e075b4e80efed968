"""Times products with quantized weights on Hopper beside our own bfloat16; writes the table of best tilings.

Each product is captured many times into one graph, over several copies of the weights, so that they come from
memory and not from the cache. Three ways are timed in turns: bfloat16 weights; codes that are turned to
operands beside the tensor cores (`gemm_codes.cu`, the tiling that is chosen now); and codes expanded to
bfloat16 first. What codes give is compared with what expanded weights give.

    python benchmarks/gemm_codes.py [--formats q4 q8 Q4_K Q6_K] [--models llama-3.1-8b] [--rows 128 1024 8192]
                                    [--tune] [--table TABLE] [--json results.json]

With `--tune` the most promising tilings of a shape are timed in place of the chosen one, for one format of
each number of bits. `--table default` writes `src/kuiperllm/ops/linear/codes_table.json`, which is then used.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemm import BF16, BYTES_PER_S, FLOPS, MODELS, ROTATED_BYTES, SAMPLE_S, Replay, shapes
from kuiperllm.backends.cuda.launch import Kernel, chip, collecting, compile_all
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.linear import LinearWeight, codes_tiling, gemm_codes, gemm_hopper
from kuiperllm.ops.linear.expand import gemm_expanded
from kuiperllm.ops.linear.gemm import gemm, gemm_16_bits
from kuiperllm.ops.linear.gemm_tiling import PLAIN, ROWS, Tiling
from kuiperllm.quant import Scheme, q4, q8
from machine import write_results

TABLE = Path(codes_tiling.__file__).with_name("codes_table.json")
FORMATS = {
    "q4": q4(64),
    "q8": q8(64),
    "Q4_K": Scheme(4, 32, DType.int8, "minimum"),
    "Q6_K": Scheme(6, 16, DType.int8),
    "q4-g32": q4(32),
    "q4-g128": q4(128),
    "q4-zeros": q4(128, symmetric=False),
    "Q8_0": q8(32),
    "Q5_K": Scheme(5, 32, DType.int8, "minimum"),
    "fp8": Scheme(8, 128, DType.float32, "e4m3"),
}
DEFAULT = ("q4", "q8", "Q4_K", "Q6_K")
TUNED = ("q4", "Q6_K", "q8")
LAYERS = {"llama-3.1-8b": 32, "llama-3.2-1b": 16, "qwen2.5-0.5b": 24, "qwen3-0.6b": 28}
COMPARED_ROWS = (16, 64, 128, 512, 1024, 2048, 8192)
ROUNDS = 5
MOST_CANDIDATES = 10
WORST_PROMISE = 1.8
LARGEST_ERROR = 6e-3
"""Of products whose scales and weights are rounded to bfloat16, relative to those of weights rounded once."""


class Operands:
    """Copies of the weights of a shape in one format, and x and results for them."""

    def __init__(self, device: Device, format: DType | Scheme, m: int, n: int, k: int) -> None:
        self.device, self.m, self.n, self.k = device, m, n, k
        nbytes = n * k * 2 if isinstance(format, DType) else format.nbytes(n, k)
        count = min(40, max(2, math.ceil(ROTATED_BYTES / nbytes)))
        self.weights = [random_weight(format, n, k, device) for _ in range(count)]
        copies = count if m * (n + k) * count < 1 << 30 else 2
        self.xs = [Tensor.empty((m, k), BF16, device) for _ in range(copies)]
        self.outs = [Tensor.empty((m, n), BF16, device) for _ in range(copies)]
        for x in self.xs:
            fill(x.reshape(m * k), rows_of_x(device))
        once = max(2e-6, 2 * m * n * k / FLOPS, (nbytes + 2 * (m * k + m * n)) / BYTES_PER_S)
        calls = max(2, min(400, int(SAMPLE_S / once)))
        self.calls = math.ceil(calls / count) * count if calls > count else calls

    def sample(self, way: str) -> Replay:
        """A captured sample of a way: `chosen`, `expanded`, or a tiling by name."""

        def run(calls: int) -> None:
            for i in range(calls):
                j = i % len(self.xs)
                multiply(way, self.xs[j], self.weights[i % len(self.weights)], self.outs[j])

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

    def error(self, way: str) -> float:
        """How far the result is from that of weights which are each rounded once."""
        found = []
        for tried in ("expanded", way):
            out = Tensor.full((self.m, self.n), math.nan, BF16, self.device)
            multiply(tried, self.xs[0], self.weights[0], out)
            found.append(out[: min(self.m, 512)].numpy().astype(np.float32))
        return float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))


def multiply(way: str, x: Tensor, weight: LinearWeight, out: Tensor) -> None:
    if weight.scheme is None:
        gemm_hopper.gemm(x, weight, out, PLAIN)
    elif way == "chosen":
        gemm(x, weight, out)
    elif way == codes_tiling.EXPANDED:
        gemm_expanded(x, weight, out, PLAIN, gemm_16_bits)
    else:
        gemm_codes.gemm(x, weight, out, PLAIN, Tiling.parse(way))


def random_weight(format: DType | Scheme, n: int, k: int, device: Device) -> LinearWeight:
    """Weights of about 1 / sqrt(k): random bytes, and scales for them."""
    weight = LinearWeight.empty(format, n, k, device=device)
    parts = weight.data, weight.scales, weight.super_scales
    for part, values in zip(parts, noise(format, k, device), strict=True):
        if part is not None and values is not None:
            fill(part, values)
    return weight


@lru_cache(maxsize=64)
def noise(format: DType | Scheme, k: int, device: Device) -> tuple[Tensor | None, ...]:
    """What data, scales and scales of scales are filled with."""
    rng = np.random.default_rng(2)

    def on_device(values: NDArray[Any]) -> Tensor:
        return Tensor.from_numpy(np.ascontiguousarray(values).reshape(-1)).to(device)

    if isinstance(format, DType):
        values = (rng.standard_normal(1 << 20) / k**0.5).astype(BF16.numpy)
        return on_device(values.view(np.uint8)), None, None
    codes = rng.integers(0, 256, 1 << 21, np.uint8)
    if format.coding == "e4m3":
        codes &= 0xBF  # numbers below 2
    size = k**-0.5 / (1 if format.coding == "e4m3" else (1 << format.bits) / 12**0.5)
    middle = (1 << format.bits) / 2
    scales = rng.uniform(0.7, 1.3, (1 << 16, 2 if format.has_zeros else 1))
    if format.has_super_blocks:
        factors = np.full((1 << 8, scales.shape[1]), size / 40)
        factors[:, 1:] *= middle
        multipliers = np.rint(scales * 40).astype(np.int8)
        return on_device(codes), on_device(multipliers), on_device(factors.astype(np.float16))
    scales *= size
    if format.has_zeros:
        scales[:, 1] = middle if format.coding == "zeros" else scales[:, 0] * middle
    return on_device(codes), on_device(scales.astype(format.scale.numpy)), None


def fill(tensor: Tensor, values: Tensor) -> None:
    for start in range(0, tensor.numel, values.numel):
        part = tensor[start : start + values.numel]
        part.copy_(values[: part.numel])


@lru_cache(maxsize=1)
def rows_of_x(device: Device) -> Tensor:
    """What x is filled with."""
    return Tensor.from_numpy(np.random.default_rng(1).standard_normal(1 << 20).astype(BF16.numpy)).to(device)


# --- what is timed ----------------------------------------------------------------------------------------


@dataclass
class Result:
    n: int
    k: int
    m: int
    format: str
    bf16_us: float
    us: dict[str, float]
    """By way: `chosen` or tilings, and `expanded`."""
    tiling: str
    error: float = 0.0
    ranking: list[tuple[float, str]] = field(default_factory=list)

    @property
    def best_us(self) -> float:
        return min(self.us.values())


def compare(device: Device, options: argparse.Namespace) -> list[Result]:
    """Bfloat16 and the two ways with codes, in turns."""
    results = []
    print("     N     K     M  format | bf16 us TFLOPS | codes us ratio  expanded ratio | error   tiling")
    for n, k in shapes(options.models):
        if n > 1 << 16:  # output projections see the last token only
            continue
        for m in options.rows:
            plain = Operands(device, BF16, m, n, k)
            bf16 = plain.sample("")
            for name in options.formats:
                results.append(_compare_one(device, name, plain, bf16))
                print(_line(results[-1]), flush=True)
            del plain, bf16
            _free(device)
    return results


def _compare_one(device: Device, name: str, plain: Operands, bf16: Replay) -> Result:
    m, n, k, scheme = plain.m, plain.n, plain.k, FORMATS[name]
    operands = Operands(device, scheme, m, n, k)
    multiprocessors = chip(device).multiprocessors
    promising = codes_tiling.candidates(m, n, k, scheme, multiprocessors)
    chosen = codes_tiling.choose(m, n, k, scheme, PLAIN, False, multiprocessors) or promising[0]
    ways = (str(chosen), codes_tiling.EXPANDED)
    error = operands.error(str(chosen))
    samples = [operands.sample(way) for way in ways]
    times: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        for taken, replay in zip(times, (bf16, *samples), strict=True):
            taken.append(replay())
    bf16_us, *us = (median(taken) for taken in times)
    del samples, operands
    _free(device)
    return Result(n, k, m, name, bf16_us, dict(zip(ways, us, strict=True)), str(chosen), error)


def tune(device: Device, options: argparse.Namespace) -> list[Result]:
    """The most promising tilings of each shape, and expanded weights."""
    results = []
    multiprocessors = chip(device).multiprocessors
    for name in options.formats:
        scheme = FORMATS[name]
        for n, k in shapes(options.models):
            if n > 1 << 16:
                continue
            for m in options.rows:
                operands = Operands(device, scheme, m, n, k)
                ranking = []
                for way in _promising(m, n, k, scheme, multiprocessors, options.most):
                    replay = operands.sample(way)
                    ranking.append((min(replay(), replay(), replay()), way))
                ranking.sort()
                error = operands.error(ranking[0][1])
                results.append(
                    Result(n, k, m, name, 0.0, {ranking[0][1]: ranking[0][0]}, ranking[0][1], error, ranking)
                )
                others = "  ".join(f"{way} {us:.1f}" for us, way in ranking[1:4])
                tflops = 2e-6 * m * n * k / ranking[0][0]
                print(f"{n:6} {k:5} {m:5} {name:6} | {ranking[0][0]:8.1f} us {tflops:5.0f} TFLOPS "
                      f"{ranking[0][1]:12} | {others}", flush=True)  # fmt: skip
                del operands
                _free(device)
    return results


def _promising(m: int, n: int, k: int, scheme: Scheme, multiprocessors: int, most: int) -> list[str]:
    tilings = codes_tiling.candidates(m, n, k, scheme, multiprocessors)

    def promise(tiling: Tiling) -> float:
        return codes_tiling.estimate(tiling, m, n, k, scheme, multiprocessors)

    worst = WORST_PROMISE * promise(tilings[0])
    names = [str(tiling) for tiling in tilings[:most] if promise(tiling) <= worst]
    return [*names, codes_tiling.EXPANDED] if m >= 512 else names


def _free(device: Device) -> None:
    device.synchronize()
    device.allocator.empty_cache()


def _line(r: Result) -> str:
    codes, expanded = r.us.values()
    bf16 = f"{r.bf16_us:7.1f} {2e-6 * r.m * r.n * r.k / r.bf16_us:6.0f}"
    ways = f"{codes:8.1f} {r.bf16_us / codes:5.2f}  {expanded:8.1f} {r.bf16_us / expanded:5.2f}"
    verdict = "" if r.error < LARGEST_ERROR else " WRONG"
    return f"{r.n:6} {r.k:5} {r.m:5} {r.format:7} | {bf16} | {ways} | {r.error:.1e} {r.tiling}{verdict}"


def summarize(results: list[Result], models: Iterable[str], rows: Iterable[int]) -> None:
    """All products of a prompt together, by model, rows and format: the better way over bfloat16."""
    by_shape = {(r.n, r.k, r.m, r.format): r for r in results}
    formats = list(dict.fromkeys(r.format for r in results))
    for model in models:
        hidden, qkv, heads, feed_forward, _ = MODELS[model]
        layer = (qkv, hidden), (hidden, heads), (2 * feed_forward, hidden), (hidden, feed_forward)
        for m in rows:
            bf16 = LAYERS[model] * sum(by_shape[*shape, m, formats[0]].bf16_us for shape in layer) / 1e3
            parts = []
            for name in formats:
                best = LAYERS[model] * sum(by_shape[*shape, m, name].best_us for shape in layer) / 1e3
                parts.append(f"{name} {best:7.2f} ms ({bf16 / best:.2f})")
            print(f"{model:14} {m:5} rows: bf16 {bf16:7.2f} ms, {', '.join(parts)}")


def write_table(path: Path, results: list[Result], device: Device) -> None:
    """The table as `codes_tiling.table` reads it; what an older one of the same chip knows besides stays."""
    best: dict[str, dict[str, dict[str, list[str]]]] = {}
    if path.exists() and (older := json.loads(path.read_text()))["chip"] == chip(device).name:
        best = older["best"]
    for r in results:
        of_bits = best.setdefault(str(FORMATS[r.format].bits), {})
        of_bits.setdefault(f"{r.n}x{r.k}", {})[str(r.m)] = best_ways(r)
    lines = []
    for bits, of_bits in best.items():
        of_shapes = ",\n".join(
            f"  {json.dumps(shape)}: {json.dumps(dict(sorted(by_rows.items(), key=lambda row: int(row[0]))))}"
            for shape, by_rows in of_bits.items()
        )
        lines.append(f" {json.dumps(bits)}: {{\n{of_shapes}\n }}")
    joined = ",\n".join(lines)
    path.write_text(f'{{"chip": {json.dumps(chip(device).name)}, "best": {{\n{joined}\n}}}}\n')


def best_ways(r: Result) -> list[str]:
    """The best way, and, if it does not fit every epilogue, the next best one that does."""
    chosen: list[str] = []
    for _, way in r.ranking:
        chosen.append(way)
        if way == codes_tiling.EXPANDED or _fits_all(way, r):
            return chosen[:1] if len(chosen) == 1 else [chosen[0], way]
    return chosen[:1]


def _fits_all(way: str, r: Result) -> bool:
    tiling, scheme = Tiling.parse(way), FORMATS[r.format]
    return all(
        codes_tiling.fits(tiling, r.m, r.n, r.k, scheme, epilogue, direct, 132)
        for epilogue in (0, 1, 2)
        for direct in (False, True)
    )


def prepare(device: Device, options: argparse.Namespace) -> None:
    """Compile what will be needed, on all processors."""
    started = time.perf_counter()
    kernels: dict[Kernel, None] = {}
    multiprocessors = chip(device).multiprocessors
    with collecting(device) as found:
        for n, k in shapes(options.models):
            if n > 1 << 16:
                continue
            for m in options.rows:
                x, out = Tensor.empty((m, k), BF16, device), Tensor.empty((m, n), BF16, device)
                formats: list[DType | Scheme] = [BF16, *(FORMATS[name] for name in options.formats)]
                for format in formats:
                    weight = LinearWeight.empty(format, n, k, device=device)
                    ways = ["expanded"]
                    if isinstance(format, Scheme):
                        most = options.most if options.tune else 1
                        ways += _promising(m, n, k, format, multiprocessors, most)
                        if chosen := codes_tiling.choose(m, n, k, format, PLAIN, False, multiprocessors):
                            ways.append(str(chosen))
                    for way in ways:
                        multiply(way, x, weight, out)
                    del weight
                del x, out
    kernels.update(found)
    _free(device)
    count = compile_all(kernels, device)
    print(f"compiled {count} of {len(kernels)} kernels in {time.perf_counter() - started:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--formats", nargs="+", choices=FORMATS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-3.1-8b", "llama-3.2-1b"])
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--tune", action="store_true", help="time many tilings")
    parser.add_argument("--most", type=int, default=MOST_CANDIDATES, help="tilings to try for a product")
    parser.add_argument("--table", help="write the best tilings to this file; default: the one that is used")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    options = parser.parse_args()
    options.formats = options.formats or (TUNED if options.tune else DEFAULT)
    options.rows = options.rows or (ROWS if options.tune else COMPARED_ROWS)
    device = Device(options.device)
    if not chip(device).is_hopper:
        parser.error(f"{chip(device).name} is no Hopper GPU")
    started = time.perf_counter()
    prepare(device, options)
    results = (tune if options.tune else compare)(device, options)
    if not options.tune:
        summarize(results, options.models, options.rows)
    elif options.table:
        write_table(TABLE if options.table == "default" else Path(options.table), results, device)
    if options.json:
        write_results(options.json, device, [asdict(result) for result in results])
    wrong = sum(result.error >= LARGEST_ERROR for result in results)
    print(f"{time.perf_counter() - started:.0f} s in all, {wrong} wrong", flush=True)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
