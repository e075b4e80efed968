"""Tries ways to do the attention of a decode step, between the two products that it stands between.

Kernels overlap, so that the fastest one alone need not be the best in a step: what counts is the time of a
layer's first three kernels, in one graph over layers whose weights and keys no cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from attention_data import DTYPE, batch_of, caches, layers_for, random, seconds_per_replay
from gemv import MODELS, Bench, Model, Product
from kuiperllm.backends.cuda.launch import chip, collecting, compile_all
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.attention.cuda_decode import Newest, Tuning, decode_mma, decode_scalar, tuning_for
from kuiperllm.ops.linear.gemv_plan import followed, plan
from kuiperllm.ops.linear.gemv_problem import Plan

SWEEP_MODELS = ("Llama-3.1-8B", "Llama-3.2-1B", "Qwen3-0.6B")
SWEEP_CONTEXTS = (128, 1024, 8192, 32_000)
WEIGHT_BYTES = 500 << 20
"""Of all layers together: many times a second-level cache."""

TOLERANCE = 2e-2
BETTER = 0.997
"""A way replaces the best so far if it takes less than so much of its time."""


@dataclass(frozen=True)
class Way:
    """How to do it: which kernel, how many parts, and when kernels start."""

    parts: int
    tuning: Tuning | None
    """Of the kernel on tensor cores; None: the one for a query head at a time."""
    followed: int | None = None
    """KiB that a block of the product in front has left when attention may start; None: all."""

    def __str__(self) -> str:
        after = "at once" if self.followed is None else f"{self.followed} KiB"
        if self.tuning is None:
            return f"heads, {self.parts} parts; after {after}"
        t = self.tuning
        what = f"{self.parts} parts, {t.warps} warps, {t.tiles} tiles, {t.stages} stages"
        return f"{what}; after {after}"


@dataclass(frozen=True)
class Measured:
    model: str
    context: int
    way: str
    us: float
    """Of both products and attention."""
    us_alone: float
    percent_alone: float
    """Attention alone, of the bandwidth."""
    least_us: float
    """What reading keys and values takes."""


class Layers:
    """Some layers of a model at one context."""

    def __init__(self, bench: Bench, name: str, context: int) -> None:
        self.bench, self.name, self.context, self.device = bench, name, context, bench.device
        self.model = m = MODELS[name]
        self.bytes = 2 * context * m.kv_heads * m.head_dim * DTYPE.itemsize
        self.qkv, self.o = _products(bench, m)
        self.count = len(self.qkv.weights)
        count = max(self.count, layers_for(self.bytes))
        self.caches = caches(context, m.kv_heads, m.head_dim, count, self.device)
        self.batch = batch_of(1, context, self.device)
        angles = np.zeros((context, m.head_dim), np.float32)
        angles[:, : m.head_dim // 2] = 1  # cosines: nothing turns
        self.newest = Newest(Tensor.from_numpy(angles).to(self.device), None, None, 0.0)
        self.raw = random((1, (m.heads + 2 * m.kv_heads) * m.head_dim), self.device)
        self._expected: NDArray[np.float64] | None = None

    def attend(self, way: Way, qkv: Tensor, layer: int, partial: Tensor, stats: Tensor) -> None:
        """Queue attention."""
        args = qkv, self.caches[layer], self.batch, self.model.head_dim**-0.5, partial, stats, self.newest
        if way.tuning is None:
            decode_scalar(*args)
        else:
            decode_mma(*args, way.tuning)

    def room(self, way: Way) -> tuple[Tensor, Tensor]:
        """For the results of parts."""
        shape = 1, way.parts, self.model.heads
        return (
            Tensor.empty((*shape, self.model.head_dim), DTYPE, self.device),
            Tensor.empty((*shape, 2), DType.float32, self.device),
        )

    def layer(self, way: Way, layer: int, partial: Tensor, stats: Tensor) -> None:
        """Queue a product, attention, and the other product."""
        product = self.qkv
        after = None if way.followed is None else way.followed << 10
        first = followed(product.problem, _planned(product, self.device), after)
        product.launch(first, layer % self.count)
        self.attend(way, product.out, layer % len(self.caches), partial, stats)
        problem = self.o.problem._replace(splits=way.parts)
        merging = replace(self.o, problem=problem, x=partial.reshape((1, way.parts, -1)), stats=stats)
        merging.launch(_planned(merging, self.device), layer % self.count)

    def measure(self, way: Way) -> Measured:
        """In a graph of all layers, and in one of attention alone."""
        partial, stats = self.room(way)
        turns = max(self.count, len(self.caches))

        def layers() -> None:
            for layer in range(turns):
                self.layer(way, layer, partial, stats)

        def alone() -> None:
            for layer in range(len(self.caches)):
                self.attend(way, self.raw, layer, partial, stats)

        us = seconds_per_replay(layers, self.device) / turns * 1e6
        us_alone = seconds_per_replay(alone, self.device) / len(self.caches) * 1e6
        least = self.bytes / self.bench.bandwidth * 1e6
        return Measured(self.name, self.context, str(way), us, us_alone, 100 * least / us_alone, least)

    def check(self, way: Way) -> float:
        """The largest difference from float64, by what is tolerated; above 1: wrong."""
        partial, stats = self.room(way)
        self.attend(way, self.raw, 0, partial, stats)
        top, total = np.moveaxis(stats.numpy()[0].astype(np.float64), -1, 0)
        weight = (np.exp2(top - top.max(0)) * total)[..., None]
        found = (np.where(weight > 0, partial.numpy()[0].astype(np.float64), 0) * weight).sum(0) / weight.sum(
            0
        )
        if self._expected is None:
            self._expected = self._attention()
        wrong = np.abs(found - self._expected) / (TOLERANCE * (1 + np.abs(self._expected)))
        return float(np.nan_to_num(wrong, nan=np.inf).max())

    def _attention(self) -> NDArray[np.float64]:
        m = self.model
        raw = self.raw.numpy().astype(np.float64).reshape(-1, m.head_dim)
        q, k, v = np.split(raw, [m.heads, m.heads + m.kv_heads])
        table = self.batch.block_table.numpy()[0]
        past_k, past_v = (x.numpy()[table] for x in (self.caches[0].keys, self.caches[0].values))
        group, found = m.heads // m.kv_heads, []
        for head in range(m.kv_heads):
            keys, values = (
                np.concatenate([x[:, head].reshape(-1, m.head_dim)[: self.context - 1], new[head : head + 1]])
                for x, new in ((past_k, k), (past_v, v))
            )
            scores = q[head * group : (head + 1) * group] @ keys.astype(np.float64).T * m.head_dim**-0.5
            weights = np.exp(scores - scores.max(1, keepdims=True))
            found.append(weights / weights.sum(1, keepdims=True) @ values.astype(np.float64))
        return np.concatenate(found)

    def ways(self) -> tuple[list[Way], list[list[Way]]]:
        """Where to begin, and what may replace it: lists of changes, tried one list after the other."""
        t = tuning_for(chip(self.device), self.model.head_dim)
        if self.context <= 512:
            few = [Way(parts, t) for parts in (1, 2, 4)]
            return [Way(4, None), *few], [[Way(4, None, None)], [Way(8, None)]]
        parts = 8 if self.context <= 2048 else 16
        first = Way(parts, t)
        wide = t._replace(warps=4, tiles=2 * t.tiles) if t.tiles < 4 else t._replace(warps=4)
        narrow = t._replace(tiles=max(1, t.tiles // 2), stages=2 * t.stages)
        shapes = [replace(first, tuning=wide), replace(first, tuning=narrow)]
        return [first, *shapes, *([Way(4, None)] if parts == 8 else [])], [
            [replace(first, tuning=t._replace(stages=stages)) for stages in (1, 2, 4, 6)],
            [replace(first, followed=left) for left in (64, 128, 192, 256)],
            [replace(first, parts=other) for other in (parts // 2, parts * 3 // 4, min(2 * parts, 16))],
        ]


def _planned(product: Product, device: Device) -> Plan:
    found = plan(chip(device), product.problem)
    assert found is not None
    return found


def _products(bench: Bench, model: Model) -> tuple[Product, Product]:
    per_layer = (2 * model.heads + 2 * model.kv_heads) * model.head_dim * model.d * DTYPE.itemsize
    few = replace(model, layers=min(model.layers, -(-WEIGHT_BYTES // per_layer)))
    qkv, o = bench.products(few, "bfloat16", 1, ("qkv", "o"))
    return qkv, o


def _change(best: Way, first: Way, other: Way) -> Way:
    """The best way so far, with what sets `other` apart from `first`."""
    changed = {k: v for k, v in vars(other).items() if v != vars(first)[k]}
    if (
        best.tuning is not None
        and first.tuning is not None
        and other.tuning is not None
        and "tuning" in changed
    ):
        fields = zip(Tuning._fields, first.tuning, other.tuning, strict=True)
        other_fields: dict[str, Any] = {name: new for name, old, new in fields if new != old}
        changed["tuning"] = best.tuning._replace(**other_fields)
    return replace(best, **changed)


def _search(layers: Layers) -> Iterator[tuple[Way, Measured]]:
    """Everything that is tried, in order; the best is the one that takes least time."""
    begin, changes = layers.ways()
    best: tuple[Way, Measured] | None = None
    seen = set()
    for group in [begin, *changes]:
        base = best[0] if best is not None else None
        for way in group:
            tried = way if base is None else _change(base, begin[0], way)
            if tried in seen:
                continue
            seen.add(tried)
            wrong = layers.check(tried)
            if wrong > 1:
                where = f"{layers.name}, {layers.context}, {tried}"
                print(f"WRONG VALUES ({wrong:.1f} times what is tolerated): {where}")
            measured = layers.measure(tried)
            yield tried, measured
            if best is None or measured.us < BETTER * best[1].us:
                best = tried, measured


def _prepare(layers: Layers) -> None:
    """Compile what the search may come to, in parallel."""
    begin, changes = layers.ways()
    ways = [*begin, *(way for group in changes for way in group)]
    tunings = {way.tuning for way in ways if way.tuning is not None}
    shapes = {(t.warps, t.tiles) for t in tunings}
    stages = {t.stages for t in tunings}
    ways += [Way(1, Tuning(w, tiles, n)) for w, tiles in shapes for n in stages]
    with collecting(layers.device) as kernels:
        for way in ways:
            layers.layer(way, 0, *layers.room(way))
    compile_all(kernels, layers.device)


def sweep(device: Device, bandwidth: float) -> list[Measured]:
    """All models and contexts; tables of what was tried, and what it gave."""
    bench = Bench(device, bandwidth)
    results: list[Measured] = []
    summary = Table("model", "context", "way", title="The first three kernels of a layer: first and best way")
    for name in ("µs", "more than at 128", "bytes alone", "attention alone", "% of bandwidth"):
        summary.add_column(name, justify="right")
    for name in SWEEP_MODELS:
        short = 0.0
        for context in SWEEP_CONTEXTS:
            layers = Layers(bench, name, context)
            _prepare(layers)
            tried = [measured for _, measured in _search(layers)]
            results += tried
            best = min(tried, key=lambda m: m.us)
            short = short or tried[0].us
            table = Table("way", title=f"{name}, {context} tokens: at least {best.least_us:.2f} µs")
            for column in ("µs", "more than at 128", "attention alone", "% of bandwidth"):
                table.add_column(column, justify="right")
            for m in sorted(tried, key=lambda m: m.us):
                table.add_row(m.way, *_figures(m, short))
            Console(width=150).print(table)
            for m in (tried[0], best):
                figures = _figures(m, short)
                summary.add_row(name, str(context), m.way, *figures[:2], f"{m.least_us:.2f}", *figures[2:])
    Console(width=150).print(summary)
    return results


def _figures(m: Measured, short: float) -> list[str]:
    return [f"{m.us:.2f}", f"{m.us - short:.2f}", f"{m.us_alone:.2f}", f"{m.percent_alone:.1f}"]
