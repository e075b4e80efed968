"""Versions of rms_norm and of the GEMV that docs/profiling.md compares: one change from each to the next.

All of them are the project's own kernels, with other template parameters, plans or neighbours than the
operators choose. `predicted` is the time over that of the version that it is compared with, put down before
these versions were measured; the reasons are in docs/profiling.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from gemv import MODELS, Bench, Model, Product
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.backends.cuda.launch import chip, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops import rms_norm as rms_norm_package
from kuiperllm.ops.add import add
from kuiperllm.ops.grid import rows
from kuiperllm.ops.linear.gemv import run, run_any
from kuiperllm.ops.linear.gemv_plan import make_plan, plan
from kuiperllm.ops.linear.gemv_problem import Plan
from kuiperllm.ops.rms_norm import add_rms_norm, rms_norm

NORM_SOURCE = Path(rms_norm_package.__file__).with_name("cuda.cu")
ACTIVATION = DType.bfloat16
EPS = 1e-5
MODEL = replace(MODELS["Llama-3.2-1B"], vocabulary=128)
VECTOR = 8
"""Elements of the activations' type that a thread loads at once."""


@dataclass(frozen=True)
class Sizes:
    """What the versions work on."""

    prefill: tuple[int, int] = (8192, 4096)
    decode: tuple[int, int] = (1, 2048)
    model: Model = MODEL
    buffers: int = 2
    """Of rows in prefill, that are used in turn: together larger than a cache."""
    calls: int = 16
    """Of a norm, in a graph."""


TINY = Sizes((3, 256), (1, 128), Model(64, 96, 2, 2, 1, 32, 16), 1, 2)


@dataclass(frozen=True)
class Work:
    """What a version does."""

    call: Callable[[int], None]
    """Queues it, for one of the buffers or layers: any number is taken."""
    kernels: tuple[str, ...]
    """That a call launches, in their order."""
    nbytes: int
    """That must be moved in any version of the same example."""
    calls: int
    """In a graph: all buffers at least once."""
    serial: tuple[Kernel, ...] = ()
    """Kernels that must not start before those in front of them have ended."""


class Setting:
    """The tensors that versions work on, made when they are first needed."""

    def __init__(self, bench: Bench, sizes: Sizes) -> None:
        self.bench = bench
        self.sizes = sizes

    @cached_property
    def products(self) -> dict[str, Product]:
        """By name, the products of a decode step."""
        found = self.bench.products(self.sizes.model, "bfloat16", 1)
        return {product.name: product for product in found if product.name in ("qkv", "gate/up")}

    @cached_property
    def prefill(self) -> list[list[Tensor]]:
        """Buffers of x, residual and out."""
        return [self._rows(self.sizes.prefill) for _ in range(self.sizes.buffers)]

    @cached_property
    def decode(self) -> list[list[Tensor]]:
        """The same, for one token."""
        return [self._rows(self.sizes.decode) for _ in range(self.sizes.calls)]

    def _rows(self, shape: tuple[int, int]) -> list[Tensor]:
        return [self.bench.filled(shape, ACTIVATION) for _ in range(3)]

    def norm_weight(self, width: int) -> Tensor:
        """Of a norm."""
        return Tensor.full((width,), 1.0, DType.float32, self.bench.device)


@dataclass(frozen=True)
class Version:
    """One way to compute an example."""

    example: str
    label: str
    change: str
    """Against the version that it is compared with."""
    against: str | None
    predicted: float | None
    build: Callable[[Setting], Work]

    @property
    def name(self) -> str:
        """Example and label."""
        return f"{self.example}/{self.label}"


# --- rms_norm ---------------------------------------------------------------------------------------------


def norm_kernel(width: int, step: int, warps: int) -> Kernel:
    """The kernel for rows of one width: `step` elements at once, so many warps for a row."""
    items = -(-width // (32 * warps * step))
    return Kernel(NORM_SOURCE, "rms_norm", T=ACTIVATION, WIDTH=step, WARPS=warps, ITEMS=items, ROWS=1)


def norm(step: int, warps: int, setting: Setting, *, decode: bool = False, serial: bool = False) -> Work:
    """rms_norm, a block for each row."""
    buffers = setting.decode if decode else setting.prefill
    count, width = buffers[0][0].shape
    kernel, weight = norm_kernel(width, step, warps), setting.norm_weight(width)

    def call(index: int) -> None:
        x, _, out = buffers[index % len(buffers)]
        inner, *strides = rows(x)
        launch(kernel, count, 32 * warps, x, weight, out, count, width, EPS, inner, *strides, *strides)

    nbytes = 2 * buffers[0][0].nbytes + weight.nbytes
    return Work(call, ("rms_norm",), nbytes, setting.sizes.calls, (kernel,) if serial else ())


def norm_of_sum(setting: Setting, *, fused: bool) -> Work:
    """Add to the residual stream, then rms_norm."""
    buffers = setting.prefill
    weight = setting.norm_weight(buffers[0][0].shape[1])

    def call(index: int) -> None:
        x, residual, out = buffers[index % len(buffers)]
        if fused:
            add_rms_norm(residual, x, weight, EPS, out=out)
        else:
            add(residual, x, out=residual)
            rms_norm(residual, weight, EPS, out=out)

    kernels = ("add_rms_norm",) if fused else ("add", "rms_norm")
    return Work(call, kernels, 4 * buffers[0][0].nbytes + weight.nbytes, setting.sizes.calls)


# --- GEMV -------------------------------------------------------------------------------------------------

Choice = Callable[[Product, Setting], Plan]


def planned(product: Product, setting: Setting) -> Plan:
    """What the operators choose."""
    return setting.bench.default(product)


def chunked(chunks: int, product: Product, setting: Setting) -> Plan:
    """So many warps for each row of the matrix."""
    found = make_plan(chip(setting.bench.device), product.problem, "vector", chunks)
    assert found is not None
    return found


def ring(stages: int | None, product: Product, setting: Setting, *, alone: bool = True) -> Plan:
    """A ring of so many stages, or as many as planned; unless `alone`, blocks may share a multiprocessor."""
    gpu, default = chip(setting.bench.device), planned(product, setting)
    if not alone:  # more than half of nothing is less than what the ring takes
        gpu = replace(gpu, shared_bytes_per_multiprocessor=0)
    found = make_plan(gpu, product.problem, "vector", default.chunks, stages or default.stages)
    assert found is not None
    return found


def norm_inside(product: str, choose: Choice, setting: Setting, *, serial: bool = False) -> Work:
    """The norm is the prologue of the GEMV."""
    chosen = setting.products[product]
    how = choose(chosen, setting)

    def call(index: int) -> None:
        chosen.launch(how, index % len(chosen.weights))

    return Work(call, ("gemv",), chosen.nbytes, len(chosen.weights), (how.kernel,) if serial else ())


def norm_apart(product: str, setting: Setting, *, plain: bool = False) -> Work:
    """The norm is a kernel; then the GEMV, or if `plain` the one for odd sizes, without a ring."""
    chosen, device = setting.products[product], setting.bench.device
    problem = chosen.problem._replace(prologue="PLAIN")
    how, normed = plan(chip(device), problem), Tensor.empty(chosen.x.shape, ACTIVATION, device)
    norm_weight = setting.norm_weight(problem.k)
    assert how is not None

    def call(index: int) -> None:
        weight = chosen.weights[index % len(chosen.weights)]
        rms_norm(chosen.x, norm_weight, EPS, out=normed)
        if plain:
            run_any(problem, normed, weight, chosen.out)
        else:
            run(how, problem, normed, weight, chosen.out)

    kernels = ("rms_norm", "gemv_any" if plain else "gemv")
    return Work(call, kernels, chosen.nbytes, len(chosen.weights))


# --- all --------------------------------------------------------------------------------------------------


def _norm_versions() -> list[Version]:
    prefill, decode = partial(Version, "norm-prefill"), partial(Version, "norm-decode")
    return [
        prefill("scalars", "2 bytes a load (WIDTH=1), 16 warps a row", None, None, partial(norm, 1, 16)),
        prefill("vectors", "16 bytes a load (WIDTH=8)", "scalars", 0.75, partial(norm, VECTOR, 16)),
        prefill("8-warps", "8 warps a row, 2 vectors a lane", "vectors", 1.0, partial(norm, VECTOR, 8)),
        prefill("4-warps", "4 warps a row, 4 vectors a lane", "vectors", 1.0, partial(norm, VECTOR, 4)),
        prefill("add-apart", "add, then rms_norm", None, None, partial(norm_of_sum, fused=False)),
        prefill("add-fused", "one kernel for both", "add-apart", 0.8, partial(norm_of_sum, fused=True)),
        decode("planned", "8 warps, a vector a lane", None, None, partial(norm, VECTOR, 8, decode=True)),
        decode("1-warp", "1 warp, 8 vectors a lane", "planned", 1.05, partial(norm, VECTOR, 1, decode=True)),
        decode(
            "serial", "waits for the kernel in front before it starts", "planned", 1.6,
            partial(norm, VECTOR, 8, decode=True, serial=True),
        ),
    ]  # fmt: skip


Predicted = dict[str, float]


def _gemv_versions(example: str, product: str, predicted: Predicted) -> list[Version]:
    """Those that both products have."""
    apart, inside = partial(norm_apart, product), partial(norm_inside, product)

    def version(label: str, change: str, against: str | None, build: Callable[[Setting], Work]) -> Version:
        return Version(example, label, change, against, predicted.get(label), build)

    return [
        version("plain", "rms_norm; then a warp an output, 2 bytes a load", None, partial(apart, plain=True)),
        version("ring", "16-byte asynchronous copies to a ring, before the wait", "plain", apart),
        version("planned", "the norm inside the GEMV, as planned", "ring", partial(inside, planned)),
        version(
            "serial", "waits for the kernel in front before it starts", "planned",
            partial(inside, planned, serial=True),
        ),
        version("1-warp", "a warp multiplies whole rows", "planned", partial(inside, partial(chunked, 1))),
        version("8-warps", "8 warps share a row", "planned", partial(inside, partial(chunked, 8))),
    ]  # fmt: skip


def _qkv_versions() -> list[Version]:
    predicted = {"ring": 0.7, "planned": 0.7, "serial": 1.35, "1-warp": 1.05, "8-warps": 1.06}
    version, inside = partial(Version, "gemv-qkv"), partial(norm_inside, "qkv")
    return [
        *_gemv_versions("gemv-qkv", "qkv", predicted),
        version(
            "whole", "3 stages: the ring takes all that a block reads", "planned", 0.95,
            partial(inside, partial(ring, 3)),
        ),
        version(
            "shared", "only the shared memory that it needs: not alone", "planned", 1.1,
            partial(inside, partial(ring, None, alone=False)),
        ),
    ]  # fmt: skip


def _gate_up_versions() -> list[Version]:
    predicted = {"ring": 0.65, "planned": 0.9, "serial": 1.1, "1-warp": 1.05, "8-warps": 1.03}
    version, inside = partial(Version, "gemv-gate-up"), partial(norm_inside, "gate/up")
    return [
        *_gemv_versions("gemv-gate-up", "gate/up", predicted),
        version("2-stages", "a ring of 2 stages", "planned", 1.05, partial(inside, partial(ring, 2))),
        version(
            "shared", "only the shared memory that these need: not alone", "2-stages", 1.1,
            partial(inside, partial(ring, 2, alone=False)),
        ),
    ]  # fmt: skip


VERSIONS = (*_norm_versions(), *_qkv_versions(), *_gate_up_versions())
