"""Times the matrix products of a decode step on a GPU, one by one and all of a step in one graph.

Every product runs over the weights of all layers in turn, which no cache holds, replayed from a graph as
decoding does it. `%` compares the bytes of weights that it reads per second with what the memory was measured
to deliver.

    python benchmarks/gemv.py [--models ...] [--rows 1 2 4 8] [--formats bfloat16 q8 q4 ...] [--json FILE]
    python benchmarks/gemv.py --sweep [--models ...] [--rows 1] [--formats ...]

With `--sweep`, every sensible way to cut a product up is tried: warps that share a row, depth of the ring,
with and without tensor cores; of quantized weights also the size of a stage, and whether a block leaves half
of a multiprocessor's shared memory to the next kernel. Since kernels overlap, the fastest alone need not be
the best in a step: a few of them replace the plan in a whole step, product after product, and stay where that
helps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
from rich.console import Console
from rich.table import Table

from kuiperllm.backends.cuda.backend import CudaBackend
from kuiperllm.backends.cuda.launch import chip, compile_all
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.linear import LinearWeight, WeightFormat, gemv_codes_plan, gemv_digits_plan
from kuiperllm.ops.linear.cuda_weights import packed_sizes
from kuiperllm.ops.linear.gemv import run
from kuiperllm.ops.linear.gemv_plan import candidates, make_plan, plan
from kuiperllm.ops.linear.gemv_problem import Method, Plan, Problem
from kuiperllm.quant import Scheme, q4, q8
from machine import write_results

SAMPLES = 7
MS_PER_SAMPLE = 4.0
FORMATS: dict[str, WeightFormat] = {
    "bfloat16": DType.bfloat16,
    **{f"q8-{group}": q8(group) for group in (32, 64, 128)},
    **{f"q4-{group}": q4(group) for group in (32, 64, 128)},
    "q8": q8(64),
    "q4": q4(64),
    "q4_k": Scheme(4, 32, DType.int8, "minimum"),
    "q5_k": Scheme(5, 32, DType.int8, "minimum"),
    "q6_k": Scheme(6, 16, DType.int8),
    "q3_k": Scheme(3, 16, DType.int8),
    "q2_k": Scheme(2, 16, DType.int8, "minimum"),
    "q5_0": Scheme(5, 32),
    "awq": Scheme(4, 128, DType.float16, "zeros"),
    "fp8": Scheme(8, 128, DType.float32, "e4m3"),
}
PLANNERS: dict[Method, Callable[..., Plan | None]] = {
    "digits": gemv_digits_plan.make_plan,
    "codes": gemv_codes_plan.make_plan,
}
IN_STEPS = 4
WAYS_OF_CODES = 5  # of warps for a row and sizes of a stage, the most promising
UNCACHED_BYTES = 256 << 20
RANDOM_BYTES = 16 << 20


@dataclass(frozen=True)
class Model:
    """Sizes as configurations name them: hidden, intermediate, layers, heads of queries and of keys."""

    d: int
    f: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    bias: bool = False
    splits: int = 4


MODELS = {
    "Llama-3.2-1B": Model(2048, 8192, 16, 32, 8, 64, 128256),
    "Llama-3.1-8B": Model(4096, 14336, 32, 32, 8, 128, 128256),
    "Qwen2.5-0.5B": Model(896, 4864, 24, 14, 2, 64, 151936, bias=True, splits=8),
    "Qwen3-0.6B": Model(1024, 3072, 28, 16, 8, 128, 151936),
}


@dataclass
class Product:
    """One of the products of a layer (or the logits), with the weights of every layer."""

    name: str
    problem: Problem
    weights: list[LinearWeight]
    x: Tensor
    out: Tensor
    stats: Tensor | None
    norm: Tensor | None
    layers: int
    """Of the model, which may have fewer of these than there are weights."""

    def launch(self, how: Plan, layer: int) -> None:
        """Queue it."""
        run(
            how, self.problem, self.x, self.weights[layer], self.out,
            stats=self.stats, norm_weight=self.norm, eps=1e-5,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Of the weights of one layer."""
        return self.weights[0].nbytes


@dataclass(frozen=True)
class Result:
    model: str
    format: str
    rows: int
    product: str
    method: str
    chunks: int
    stages: int
    units: int
    shared: int
    us: float
    gigabytes_per_s: float
    percent: float


class Bench:
    """One GPU, and random bytes that weights are made of."""

    def __init__(
        self, device: Device, bandwidth: float | None = None, uncached_bytes: int = UNCACHED_BYTES
    ) -> None:
        """Prepare.

        Args:
            device: the GPU.
            bandwidth: bytes per second, if they are known.
            uncached_bytes: of weights that one product goes through in turn.
        """
        self.device = device
        self.backend = cast("CudaBackend", device.backend)
        self.bandwidth = bandwidth or self.backend.read_bandwidth()
        self.uncached_bytes = uncached_bytes
        rng = np.random.default_rng(0)
        count = min(RANDOM_BYTES, uncached_bytes) // 2
        noise = rng.standard_normal(count, np.float32) * 0.02
        self.noise = Tensor.from_numpy(noise.astype(DType.bfloat16.numpy).view(np.uint8)).to(device)

    def products(
        self,
        model: Model,
        format: str,
        rows: int,
        names: Sequence[str] = ("qkv", "o", "gate/up", "down", "logits"),
    ) -> list[Product]:
        """The products of a step, or those of them with these names."""
        width = model.heads * model.head_dim
        qkv = width + 2 * model.kv_heads * model.head_dim
        shapes = [
            ("qkv", qkv, model.d, "NORM", "STORE", model.layers),
            ("o", model.d, width, "MERGE", "ADD", model.layers),
            ("gate/up", model.f, model.d, "NORM", "SWIGLU", model.layers),
            ("down", model.d, model.f, "PLAIN", "ADD", model.layers),
            ("logits", model.vocabulary, model.d, "NORM", "STORE", 1),
        ]
        return [
            self._product(model, format, rows, name, outputs, k, prologue, epilogue, layers)
            for name, outputs, k, prologue, epilogue, layers in shapes
            if name in names
        ]

    def _product(
        self, model: Model, format: str, rows: int, name: str, outputs: int, k: int, prologue: str,
        epilogue: str, layers: int,
    ) -> Product:  # fmt: skip
        activation, merges = DType.bfloat16, prologue == "MERGE"
        n, kept_as = outputs * (2 if epilogue == "SWIGLU" else 1), FORMATS[format]
        problem = Problem(
            rows, outputs, k, kept_as, activation,
            DType.float32 if name == "logits" else activation, model.bias and name == "qkv",
            prologue, epilogue, model.splits if merges else 1, model.head_dim if merges else 0,
        )  # fmt: skip
        shape = (rows, model.splits, k) if merges else (rows, k)
        copies = -(-self.uncached_bytes // packed_sizes(kept_as, n, k).data)
        return Product(
            name,
            problem,
            [self._weight(kept_as, n, k, problem.bias) for _ in range(max(layers, copies))],
            self.filled(shape, activation),
            Tensor.zeros((rows, outputs), problem.out, self.device),
            Tensor.full((rows, model.splits, model.heads, 2), 1.0, DType.float32, self.device)
            if merges
            else None,
            Tensor.full((k,), 1.0, DType.float32, self.device) if prologue == "NORM" else None,
            layers,
        )

    def _weight(self, kept_as: WeightFormat, n: int, k: int, bias: bool) -> LinearWeight:
        sizes = packed_sizes(kept_as, n, k)

        def full(count: int, value: float, dtype: DType) -> Tensor | None:
            return Tensor.full((count,), value, dtype, self.device) if count else None

        scale = kept_as.scale if isinstance(kept_as, Scheme) else DType.float16
        return LinearWeight(
            kept_as, n, k,
            self.filled((sizes.data,), DType.uint8),
            full(sizes.scales, 20 if scale is DType.int8 else 1e-3, scale),
            full(sizes.super_scales, 1e-4, DType.float16),
            bias=full(sizes.bias if bias else 0, 0, DType.float32),
        )  # fmt: skip

    def filled(self, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """Random bytes."""
        made = Tensor.empty(shape, dtype, self.device)
        flat = Tensor(made.buffer, DType.uint8, (made.nbytes,))
        for start in range(0, made.nbytes, self.noise.nbytes):
            piece = flat[start : start + self.noise.nbytes]
            piece.copy_(self.noise[: piece.shape[0]])
        return made

    def ms(self, work: Callable[[], None]) -> float:
        """Of one replay of what `work` queues: the median of some samples."""
        work()
        self.device.synchronize()
        with self.device.capture() as graph:
            work()

        def sample(repeats: int) -> float:
            start = self.backend.record(timing=True)
            for _ in range(repeats):
                graph.replay()
            return self.backend.record(timing=True).ms_since(start) / repeats

        sample(2)
        repeats = max(1, round(MS_PER_SAMPLE / max(sample(2), 1e-3)))
        return median(sample(repeats) for _ in range(SAMPLES))

    def measure(self, name: str, product: Product, how: Plan) -> Result:
        """One product, over the weights of all layers in turn."""
        layers = len(product.weights)

        def work() -> None:
            for layer in range(layers):
                product.launch(how, layer)

        us = self.ms(work) * 1000 / layers
        rate = product.nbytes / us * 1e6
        return Result(
            name, _format(product.problem), product.problem.rows, product.name, how.method, how.chunks,
            how.stages, how.units, how.shared, us, rate / 1e9, 100 * rate / self.bandwidth,
        )  # fmt: skip

    def measure_step(self, name: str, products: Sequence[Product], plans: Sequence[Plan]) -> Result:
        """All products of a step in their order: a step without attention."""
        *of_layers, logits = list(zip(products, plans, strict=True))

        def work() -> None:
            for layer in range(products[0].layers):
                for product, how in of_layers:
                    product.launch(how, layer)
            logits[0].launch(logits[1], 0)

        us = self.ms(work) * 1000
        rate = sum(p.nbytes * p.layers for p in products) / us * 1e6
        problem = products[0].problem
        return Result(
            name, _format(problem), problem.rows, "step", "", 0, 0, 0, 0, us, rate / 1e9,
            100 * rate / self.bandwidth,
        )  # fmt: skip

    def compile(self, plans: Sequence[Plan]) -> None:
        """All kernels at once."""
        compile_all([how.kernel for how in plans], self.device)

    def default(self, product: Product) -> Plan:
        """What the operators would launch."""
        found = plan(chip(self.device), product.problem)
        assert found is not None
        return found

    def ways(self, product: Product) -> list[Plan]:
        """Every sensible plan of a product, the default first."""
        gpu, first = chip(self.device), self.default(product)
        found = {first: None}
        if product.problem.scheme is not None:
            for codes_method in PLANNERS:
                found |= dict.fromkeys(self._ways_of_codes(product.problem, codes_method))
            return list(found)
        methods: tuple[Method, ...] = ("vector", "tensor")
        for method in methods:
            if method == "vector" and product.problem.rows > 2:
                continue
            for chunks in (1, 2, 4, 8):
                most = make_plan(gpu, product.problem, method, chunks)
                if most is None or (method == "vector" and product.problem.k // chunks > 4096):
                    continue
                found[most] = None
                for stages in (most.stages // 2, most.stages * 3 // 4, most.stages + 1):
                    other = make_plan(gpu, product.problem, method, chunks, stages) if stages >= 2 else None
                    if other is not None:
                        found[other] = None
        return list(found)

    def _ways_of_codes(self, problem: Problem, method: Method) -> Iterator[Plan]:
        gpu = chip(self.device)
        promising = sorted(candidates(gpu, problem, method), key=lambda pair: pair[0])[:WAYS_OF_CODES]
        for _, how in promising:
            for beside in (False, True):
                depths = {None, 2, max(2, how.stages // 2), how.stages * 3 // 2}
                for stages in sorted(depths, key=str):
                    other = PLANNERS[method](gpu, problem, how.chunks, how.units, stages, beside=beside)
                    if other is not None:
                        yield other


def _format(problem: Problem) -> str:
    return next(name for name, kept_as in FORMATS.items() if kept_as == problem.format)


def show(results: Sequence[Result], title: str) -> None:
    table = Table(title=title)
    texts, numbers = ("product", "method"), ("chunks", "units", "stages", "KiB", "µs", "GB/s", "%")
    for name in (*texts, *numbers):
        table.add_column(name, justify="left" if name in texts else "right")
    for r in results:
        table.add_row(
            r.product, r.method, *(str(n or "") for n in (r.chunks, r.units, r.stages, r.shared >> 10)),
            f"{r.us:.2f}", f"{r.gigabytes_per_s:.0f}", f"{r.percent:.1f}",
        )  # fmt: skip
    Console(width=110).print(table)


def sweep(bench: Bench, name: str, products: list[Product]) -> list[Result]:
    """Every way of every product alone, the fastest first; then in a step."""
    ways = [bench.ways(product) for product in products]
    bench.compile([how for some in ways for how in some])
    results, fastest = [], []
    for product, some in zip(products, ways, strict=True):
        timed = [(bench.measure(name, product, how), how) for how in some]
        default = timed[0][0]
        timed.sort(key=lambda pair: pair[0].us)
        results += [result for result, _ in timed]
        fastest.append([how for _, how in timed[:IN_STEPS]])
        show([default, *(r for r, _ in timed[:6])], f"{product.name}: as planned, then the fastest")
    chosen = [some[0] for some in ways]
    steps = [bench.measure_step(name, products, chosen)]
    best = steps[0].us
    for i, some in enumerate(fastest):
        for how in some:
            tried = [*chosen[:i], how, *chosen[i + 1 :]]
            step = bench.measure_step(name, products, tried)
            if step.us < best * 0.998:
                best, chosen = step.us, tried
                steps.append(step)
    show(steps, "all products of a step: as planned, and better ones")
    for product, how in zip(products, chosen, strict=True):
        print(
            f"  {product.name:8} {how.method} chunks={how.chunks} units={how.units} stages={how.stages} "
            f"{how.shared >> 10} KiB"
        )
    return results + steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, help="default: 1 2 4 8; with --sweep 1")
    parser.add_argument(
        "--formats", nargs="+", choices=list(FORMATS), help="default: bfloat16 q8 q4; with --sweep q4"
    )
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    bench = Bench(Device(options.device))
    print(f"{chip(bench.device).name}, reads {bench.bandwidth / 1e9:.0f} GB/s", flush=True)
    results: list[Result] = []
    for name in options.models:
        for format in options.formats or (["q4"] if options.sweep else ["bfloat16", "q8", "q4"]):
            for rows in options.rows or ([1] if options.sweep else [1, 2, 4, 8]):
                products = bench.products(MODELS[name], format, rows)
                if options.sweep:
                    print(f"\n{name}, {format}, {rows} rows", flush=True)
                    results += sweep(bench, name, products)
                    continue
                # Without a plan there is no room for all rows of x: operators take half of them at a time.
                planned = [p for p in products if plan(chip(bench.device), p.problem) is not None]
                plans = [bench.default(product) for product in planned]
                bench.compile(plans)
                found = [bench.measure(name, *pair) for pair in zip(planned, plans, strict=True)]
                if len(planned) == len(products):
                    found.append(bench.measure_step(name, products, plans))
                show(found, f"{name}, {format}, {rows} rows")
                results += found
    if options.json:
        found = [asdict(result) for result in results]
        write_results(options.json, bench.device, found, read_bytes_per_s=bench.bandwidth)


if __name__ == "__main__":
    main()
