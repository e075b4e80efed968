"""How a matrix product is cut up on Hopper: the tilings there are, and which one is best for a shape.

A table of measurements (`gemm_table.json`, written by `benchmarks/gemm.py`) says what is best for the shapes
of common models, and for their neighbours. Other shapes are judged by an estimate of the time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

from kuiperllm.errors import KernelError

_TABLE = Path(__file__).with_name("gemm_table.json")

PLAIN, ACCUMULATE, SWIGLU = 0, 1, 2
"""What happens to a product: nothing, it is added to the result, it is gated."""

NO_SPLIT, SPLIT_EVENLY, SPLIT_IN_CLUSTER = 0, 1, 2
"""Whether blocks share the columns of K of a tile."""

MAX_COUNTERS = 1 << 16
"""Tiles times warpgroups that may be split evenly."""

_STEP = 64  # columns of K that a block multiplies at a time
_MAX_STAGES = 20
_NAME = re.compile(r"([ns])(\d+)x(\d+)(?:c(\d)(q?))?([ed]?)(f?)(r2)?(?:g(\d+))?")


@dataclass(frozen=True, slots=True)
class Tiling:
    """A configuration of `gemm_wgmma.cu`, where its parts are explained; named like `s64x32c4dfr2g16`."""

    tile_p: int
    tile_q: int
    cluster: int = 1
    swap: bool = False
    split: int = NO_SPLIT
    resident: int = 1
    stream: bool = False
    share_p: bool = False
    raster: int = 8
    """Tiles along P that are worked on before the next along Q."""

    @classmethod
    def parse(cls, name: str) -> Tiling:
        """The tiling of this name.

        Raises:
            KernelError: the name is malformed.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise KernelError(f"linear: {name!r} names no tiling of a matrix product; s64x32c4d does")
        swap, p, q, cluster, share_p, split, stream, resident, raster = match.groups()
        return cls(
            tile_p=int(p),
            tile_q=int(q),
            cluster=int(cluster or 1),
            swap=swap == "s",
            split=("", "e", "d").index(split),
            resident=2 if resident else 1,
            stream=bool(stream),
            share_p=bool(share_p),
            raster=int(raster or 8),
        )

    def __str__(self) -> str:
        cluster = f"c{self.cluster}{'q' if self.share_p else ''}" if self.cluster > 1 else ""
        return (
            f"{'s' if self.swap else 'n'}{self.tile_p}x{self.tile_q}{cluster}{('', 'e', 'd')[self.split]}"
            f"{'f' if self.stream else ''}{'r2' if self.resident == 2 else ''}"
            f"{f'g{self.raster}' if self.raster != 8 else ''}"
        )

    # --- memory -------------------------------------------------------------------------------------------

    @property
    def groups(self) -> int:
        """Warpgroups of a block that multiply."""
        return self.tile_p // 64

    @property
    def shares(self) -> int:
        """Blocks that share the copy of an operand."""
        return 1 if self.split == SPLIT_IN_CLUSTER else self.cluster

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of P and of Q that one block copies."""
        p, q, shares = self.tile_p, self.tile_q, self.shares
        return (p // shares, q) if self.share_p else (p, q // shares)

    @property
    def chunk(self) -> int:
        """Rows of Q in a chunk on its way out."""
        if self.tile_q % 64 == 0:
            return 64
        return self.tile_q if self.swap else 32 if self.tile_q % 32 == 0 else 16

    def stages(self, direct: bool) -> int:
        """Pieces of K that fit into shared memory; two blocks share 228 KiB, less 1 KiB for each."""
        limit = 227 << 10 if self.resident == 1 else 113 << 10
        stage = (self.tile_p + self.tile_q) * _STEP * 2
        return min(_MAX_STAGES, (limit - self.other_bytes(direct)) // (stage + 16))

    def shared_bytes(self, direct: bool) -> int:
        """Shared memory of a block."""
        stage = (self.tile_p + self.tile_q) * _STEP * 2
        return self.stages(direct) * (stage + 16) + self.other_bytes(direct)

    def other_bytes(self, direct: bool) -> int:
        """All but the stages and their two barriers: chunks, partial sums, barriers, alignment."""
        chunks = 0 if direct else self.groups * 2 * 64 * self.chunk * 2
        partials = 0
        if self.split == SPLIT_IN_CLUSTER:
            partials = (self.cluster - 1) * self.tile_p * self.tile_q * 4
        return chunks + partials + 16 * self.groups + 8 + 4 * self.groups + 1024

    # --- work ---------------------------------------------------------------------------------------------

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Tiles along P and Q, for m rows of X and n of W."""
        p, q = (n, m) if self.swap else (m, n)
        return -(-p // self.tile_p), -(-q // self.tile_q)

    def clusters(self, m: int, n: int, k: int, multiprocessors: int, step: int = _STEP) -> int:
        """Clusters to launch: one for each tile that they split, otherwise as many as run at a time.

        `step`: columns of K that a block multiplies at a time.
        """
        p, q = self.tiles(m, n)
        if self.split == SPLIT_IN_CLUSTER:
            return p * q
        items = p * -(-q // self.cluster) if self.share_p else -(-p // self.cluster) * q
        if self.split == SPLIT_EVENLY:
            items *= -(-k // step)
        return min(items, self.most_clusters(multiprocessors))

    def most_clusters(self, multiprocessors: int) -> int:
        """Clusters that run at a time. They stay in a group of multiprocessors, which has 16 or 18."""
        usable = multiprocessors // 16 * 16 if self.cluster > 2 else multiprocessors
        return max(1, usable * self.resident // self.cluster)

    def fits(self, m: int, n: int, k: int, epilogue: int, direct: bool, multiprocessors: int) -> bool:
        """Whether the kernel can be used."""
        steps = -(-k // _STEP)
        if self.split == SPLIT_IN_CLUSTER and steps < self.cluster:
            return False
        if self.split == SPLIT_EVENLY:
            p, q = self.tiles(m, n)
            items = (p + self.cluster) * (q + self.cluster)
            counted = items * self.cluster * self.groups
            if counted > MAX_COUNTERS or items * steps * (multiprocessors * self.resident + 1) >= 1 << 32:
                return False
        if direct and self.tile_q > (128 if epilogue == SWIGLU else 192):  # too many registers
            return False
        return self.swap or epilogue == PLAIN or self.tile_q % (128 if epilogue == SWIGLU else 64) == 0

    def estimate(self, m: int, n: int, k: int, multiprocessors: int) -> float:
        """Roughly how many clock cycles a product takes.

        Of 100 shapes with 8 or more tilings measured, what it finds best is 4 % slower than what is.
        """
        p, q = self.tiles(m, n)
        working = multiprocessors - (_LEFT_BY_LARGE_CLUSTERS if self.cluster > 2 else 0)
        steps, clusters = -(-k // _STEP), self.most_clusters(working)
        partials = 2.0  # of a tile
        if self.split == SPLIT_EVENLY:
            blocks = clusters * self.cluster
            rounds, passes = 1, -(-p * q * steps // blocks)
            partials = max(partials, 1 + blocks / (p * q))
        elif self.split == SPLIT_IN_CLUSTER:
            rounds = -(-p * q // clusters)
            passes = rounds * -(-steps // self.cluster)
        else:
            items = p * -(-q // self.cluster) if self.share_p else -(-p // self.cluster) * q
            rounds = -(-items // clusters)
            passes = rounds * steps
        tile = self.tile_p * self.tile_q
        multiplying = max(tile / _TILE_PER_CYCLE, self.groups * (64 + self.tile_q)) * self.resident
        copying = sum(self.rows) * _STEP * 2 / _CACHE_BYTES_PER_CYCLE * self.resident
        step = max(multiplying, copying, _LATENCY / self.stages(False))
        memory = 2 * (n * k + m * k + m * n) / (_MEMORY_BYTES_PER_CYCLE * multiprocessors)
        merging = (0, 8000 + 0.09 * tile * partials, 800 + (self.cluster - 1) * tile / 16)[self.split]
        last = tile * 2 / _WRITE_BYTES_PER_CYCLE * rounds
        return max(passes * step, memory) + _LATENCY + merging + last


# Of one multiprocessor of an H200 at 1.75 GHz, for the estimate.
_TILE_PER_CYCLE = 30  # elements of a tile by 64 columns
_CACHE_BYTES_PER_CYCLE = 36
_MEMORY_BYTES_PER_CYCLE = 18
_WRITE_BYTES_PER_CYCLE = 32
_LATENCY = 1200
_LEFT_BY_LARGE_CLUSTERS = 16  # multiprocessors; 32 clusters of 4 took two rounds


_FEW_ROWS = "s64x{q}c2d s64x{q}c4d s64x{q}c2dr2 s64x{q}c4dr2 s128x{q}c2d s128x{q}c4d s64x{q}c2 s128x{q}c2"
_FEW_ROWS += " s64x{q}c2q s64x{q}e s128x{q}ef"
_MORE_ROWS = """
    n128x256c2 n128x256c2g16 n128x256c2g4 n128x256 n128x256g16 n128x224 n128x224c2 n128x192 n128x192c2
    n128x160 n128x160c2 n192x128c2 n128x128 n128x128c2 n128x128c2d n128x128e n128x128c2e n128x96
    n128x96c2 n128x64 n128x64c2 n128x64c2d n64x128 n64x128c2 n64x128c2d n64x96 n64x96c2 n64x64c2
    n64x64c4 s64x64c4 s64x128 s64x128c2 s64x128c2d s64x128e s64x128c2e s128x128 s128x128c2 s128x128e
    s128x128c2e s192x64 s128x256c2 n128x256c2e s128x256c2e n128x96c2d
"""  # of those that promise the same the first is taken


@cache
def all_tilings() -> tuple[Tiling, ...]:
    """The tilings that are worth a try."""
    names = [name for q in (16, 32, 64) for name in _FEW_ROWS.format(q=q).split()] + _MORE_ROWS.split()
    return tuple(tiling for tiling in map(Tiling.parse, names) if tiling.stages(direct=False) > 2)


def candidates(
    m: int, n: int, k: int, multiprocessors: int, epilogue: int = PLAIN, direct: bool = False
) -> list[Tiling]:
    """The tilings that can be right for a shape, the most promising first."""
    fitting = [t for t in all_tilings() if t.fits(m, n, k, epilogue, direct, multiprocessors)]
    return sorted(fitting, key=lambda tiling: tiling.estimate(m, n, k, multiprocessors))


# --- the choice -------------------------------------------------------------------------------------------

ROWS = (16, 32, 64, 128, 256, 384, 512, 1024, 2048, 4096, 8192)
"""The numbers of rows of X that the table knows; others count as the next larger one."""

_NEAR = 1.0
"""How far, in powers of two of N and K together, a shape may lie from one that was measured."""

Table = Mapping[tuple[int, int], Mapping[int, tuple[Tiling, ...]]]


@lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, epilogue: int, direct: bool, multiprocessors: int) -> Tiling:
    """The tiling for a product [m, k] x [n, k].

    Args:
        m: rows of X.
        n: rows of W.
        k: columns of both.
        epilogue: PLAIN, ACCUMULATE or SWIGLU.
        direct: whether threads write the result themselves.
        multiprocessors: how many the chip has.
    """
    for tiling in measured(m, n, k, table()):
        if tiling.fits(m, n, k, epilogue, direct, multiprocessors):
            return tiling
    return candidates(m, n, k, multiprocessors, epilogue, direct)[0]


T = TypeVar("T")


def measured(
    m: int, n: int, k: int, known: Mapping[tuple[int, int], Mapping[int, tuple[T, ...]]]
) -> tuple[T, ...]:
    """What was best for the nearest shape that was measured, best first; nothing if none is near."""

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log2(shape[0] / n)) + abs(math.log2(shape[1] / k))

    nearest = min(known, key=distance, default=None)
    if nearest is None or distance(nearest) > _NEAR:
        return ()
    by_rows = known[nearest]
    return by_rows[min((rows for rows in by_rows if rows >= m), default=max(by_rows))]


@cache
def table() -> Table:
    """What was measured: (N, K) to rows of X to the best tilings."""
    if not _TABLE.exists():
        return {}
    entries = json.loads(_TABLE.read_text(encoding="utf-8"))["best"]
    return {
        (int(n), int(k)): {int(m): tuple(map(Tiling.parse, names)) for m, names in by_rows.items()}
        for (n, k), by_rows in ((shape.split("x"), by_rows) for shape, by_rows in entries.items())
    }
