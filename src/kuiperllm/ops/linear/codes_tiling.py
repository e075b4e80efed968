"""How products with quantized weights are cut up on Hopper: tilings of `gemm_codes.cu`, and which is best.

Names and parts are those of `gemm_tiling`; P is W in all of them. As there, a table of measurements
(`codes_table.json`, written by `benchmarks/gemm_codes.py`) knows what is best for the shapes of common models
and their neighbours, for some numbers of bits; an estimate of the time decides elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

from kuiperllm.ops.linear.gemm_tiling import SPLIT_EVENLY, SPLIT_IN_CLUSTER, Tiling, measured
from kuiperllm.ops.linear.planes import plane_bits
from kuiperllm.quant import Scheme

_TABLE = Path(__file__).with_name("codes_table.json")

EXPANDED = "expanded"
"""In the table, the name of the other way: expand the weights, and multiply 16 bits."""

EXPANDING_ROWS = 2048
"""Rows of x from which that is taken for the better one where nothing is known."""

_PART = 64  # columns that are turned to operands together
_LEAST_STAGES, _MOST_STAGES = 3, 20
_WIDE_STEP_ROWS = 128
"""Tiles of no more rows of x take 128 columns of K at a time: rows of codes are short."""

_FEW_ROWS = """
    s64x{q} s64x{q}c2d s64x{q}c4d s64x{q}r2 s64x{q}c2dr2 s64x{q}c4dr2 s128x{q} s128x{q}c2d s128x{q}c4d
    s128x{q}c2 s64x{q}e s128x{q}e
"""
_MORE_ROWS = """
    s128x256c2 s128x256 s128x256c2g16 s128x256e s128x256c2e s128x192c2 s128x192 s128x192e s192x128c2 s192x128
    s192x128e s128x128c2 s128x128 s128x128c2d s128x128c4d s128x128e s128x128c2e s64x128c2 s64x128 s64x128c2d
    s64x128c4d s64x128e s192x64
"""  # of those that promise the same the first is taken


@cache
def all_tilings() -> tuple[Tiling, ...]:
    """The tilings that are worth a try."""
    names = _MORE_ROWS.split() + [name for q in (16, 32, 64) for name in _FEW_ROWS.format(q=q).split()]
    return tuple(map(Tiling.parse, names))


# --- memory -----------------------------------------------------------------------------------------------


def step_columns(tiling: Tiling, k: int) -> int:
    """Columns of K that a block multiplies at a time."""
    return 2 * _PART if tiling.tile_q <= _WIDE_STEP_ROWS and k % (2 * _PART) == 0 else _PART


def stages(tiling: Tiling, scheme: Scheme, step: int, direct: bool) -> int:
    """Pieces of K that fit into shared memory; two blocks share 228 KiB, less 1 KiB for each."""
    limit = 227 << 10 if tiling.resident == 1 else 113 << 10
    return min(_MOST_STAGES, (limit - _other_bytes(tiling, direct)) // _stage_bytes(tiling, scheme, step))


def shared_bytes(tiling: Tiling, scheme: Scheme, step: int, direct: bool) -> int:
    """Shared memory of a block."""
    of_stages = stages(tiling, scheme, step, direct) * _stage_bytes(tiling, scheme, step)
    return of_stages + _other_bytes(tiling, direct)


def _stage_bytes(tiling: Tiling, scheme: Scheme, step: int) -> int:
    """Of codes, x, factors, and two barriers."""
    groups = max(1, step // scheme.group_size)
    of_row = _row_bytes(scheme, step) + groups * (8 if scheme.has_zeros else 4)
    return tiling.tile_p * of_row + tiling.tile_q * step * 2 + 16


def _row_bytes(scheme: Scheme, step: int) -> int:
    """Of a row of codes in a stage; 16 of each plane are the least that can be copied."""
    return sum(max(16, step * bits // 8) for bits in plane_bits(scheme) if bits)


def _other_bytes(tiling: Tiling, direct: bool) -> int:
    return tiling.other_bytes(direct) + 16  # where factors begin is rounded up


# --- the choice -------------------------------------------------------------------------------------------


def fits(
    tiling: Tiling, m: int, n: int, k: int, scheme: Scheme, epilogue: int, direct: bool, multiprocessors: int
) -> bool:
    """Whether the kernel can be used, and has enough stages to keep copies under way."""
    step = step_columns(tiling, k)
    if tiling.split == SPLIT_IN_CLUSTER and k // step < tiling.cluster:
        return False
    if stages(tiling, scheme, step, direct) < _LEAST_STAGES:
        return False
    return tiling.fits(m, n, k, epilogue, direct, multiprocessors)


@lru_cache(maxsize=4096)
def choose(
    m: int, n: int, k: int, scheme: Scheme, epilogue: int, direct: bool, multiprocessors: int
) -> Tiling | None:
    """The tiling for a product [m, k] x [n, k], see `gemm_tiling.choose`; None: expand the weights."""
    for tiling in measured(m, n, k, _of_bits(scheme.bits)):
        if tiling is None or fits(tiling, m, n, k, scheme, epilogue, direct, multiprocessors):
            return tiling
    promising = candidates(m, n, k, scheme, multiprocessors, epilogue, direct)
    return promising[0] if promising and m < EXPANDING_ROWS else None


Table = Mapping[tuple[int, int], Mapping[int, tuple[Tiling | None, ...]]]


def _of_bits(bits: int) -> Table:
    """What was measured for codes of so many bits, or of about as many."""
    known = table()
    return known[min(known, key=lambda other: abs(other - bits))] if known else {}


@cache
def table() -> Mapping[int, Table]:
    """What was measured: bits to (N, K) to rows of X to the best tilings; None: expanded weights."""
    if not _TABLE.exists():
        return {}
    entries = json.loads(_TABLE.read_text(encoding="utf-8"))["best"]

    def parsed(names: list[str]) -> tuple[Tiling | None, ...]:
        return tuple(None if name == EXPANDED else Tiling.parse(name) for name in names)

    return {
        int(bits): {
            (int(n), int(k)): {int(m): parsed(names) for m, names in by_rows.items()}
            for (n, k), by_rows in ((shape.split("x"), by_rows) for shape, by_rows in shapes.items())
        }
        for bits, shapes in entries.items()
    }


def candidates(
    m: int, n: int, k: int, scheme: Scheme, multiprocessors: int, epilogue: int = 0, direct: bool = False
) -> list[Tiling]:
    """The tilings that can be right for a shape, the most promising first."""
    fitting = [t for t in all_tilings() if fits(t, m, n, k, scheme, epilogue, direct, multiprocessors)]
    return sorted(fitting, key=lambda tiling: estimate(tiling, m, n, k, scheme, multiprocessors))


def estimate(tiling: Tiling, m: int, n: int, k: int, scheme: Scheme, multiprocessors: int) -> float:
    """Roughly how many clock cycles a product takes."""
    p, q = tiling.tiles(m, n)
    step = step_columns(tiling, k)
    steps, clusters = k // step, tiling.most_clusters(multiprocessors)
    if tiling.split == SPLIT_EVENLY:
        rounds, passes = 1, -(-p * q * steps // (clusters * tiling.cluster))
    elif tiling.split == SPLIT_IN_CLUSTER:
        rounds = -(-p * q // clusters)
        passes = rounds * -(-steps // tiling.cluster)
    else:
        rounds = -(-(-(-p // tiling.cluster) * q) // clusters)
        passes = rounds * steps
    parts = step // _PART
    tile = tiling.tile_p * tiling.tile_q
    turning = tiling.groups * _issue_slots(scheme) / _ISSUE_SHARE
    at_best = max(tile / _TILE_PER_CYCLE, turning + tiling.groups * _WAIT)
    multiplying = (at_best + _NOT_BESIDE * turning) * parts * tiling.resident
    read = tiling.tile_p * _row_bytes(scheme, step) + tiling.rows[1] * step * 2
    copying = read / _CACHE_BYTES_PER_CYCLE * tiling.resident
    of_step = max(multiplying, copying, _LATENCY / stages(tiling, scheme, step, False))
    memory = (scheme.nbytes(n, k) + 2 * (m * k + m * n)) / (_MEMORY_BYTES_PER_CYCLE * multiprocessors)
    merging = (0, 3000 + tile / 8, 800 + (tiling.cluster - 1) * tile / 16)[tiling.split]
    last = tile * 2 / _WRITE_BYTES_PER_CYCLE * rounds
    return max(passes * of_step, memory) + _LATENCY + merging + last


def _issue_slots(scheme: Scheme) -> int:
    """Instructions of a warp for its share of 64 rows by 64 columns: to make operands, and around that."""
    of_pair = {8: 5, 6: 7, 5: 7, 4: 4, 3: 7, 2: 5}[scheme.bits] + (1 if scheme.coding == "zeros" else 0)
    return 16 * of_pair + 60


# Of one multiprocessor of an H200 at 1.75 GHz, for the estimate.
_TILE_PER_CYCLE = 28  # elements of a tile by 64 columns
_ISSUE_SHARE = 0.6  # of a cycle's instruction, with one warp of a warpgroup beside one or two others
_NOT_BESIDE = 0.15  # of the time to make operands, when nothing is multiplied
_WAIT = 30  # cycles for barriers and the first codes of 64 columns
_CACHE_BYTES_PER_CYCLE = 30
_MEMORY_BYTES_PER_CYCLE = 18
_WRITE_BYTES_PER_CYCLE = 32
_LATENCY = 1200
