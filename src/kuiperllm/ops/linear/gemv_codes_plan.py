"""How a product with few rows of x and quantized weights is cut up for one GPU; see gemv_codes.cu.

Plain arithmetic on sizes, without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.driver import Chip
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.ops.linear.gemv_problem import (
    STATIC_BYTES,
    VECTOR,
    WARPS,
    Plan,
    Problem,
    alone,
    deal,
    half,
    pace,
    ring_stages,
    tile_sums_bytes,
)
from kuiperllm.ops.linear.planes import template
from kuiperllm.quant import SUPER_BLOCK, Scheme

UNITS = (1, 2, 4)
_SOURCE = Path(__file__).with_name("gemv_codes.cu")
_MAX_PASSES = 14  # vectors of a row of x that a lane holds in registers
_TWO_BLOCKS_PASSES = {"PLAIN": 8, "NORM": 4, "MERGE": 4}  # up to so many, the registers of two blocks fit
_TILE_ROWS = 16
_AHEAD_BYTES = 64 << 10  # that a block always may fetch ahead: as much as a multiprocessor has under way
_AHEAD_SHARE = 0.6  # of what a block reads; more only up to `_AHEAD_BYTES`

# What a warp does, about, in products of a tile with a unit.
_UNIT_COST = {1: 1.25, 2: 1.0, 4: 0.97}
_TILE_COST = 0.35
_PASS_COST = 0.6


class Shape:
    """The sizes that the kernel derives from its template parameters."""

    def __init__(self, problem: Problem, chunks: int, units: int) -> None:
        scheme = problem.scheme
        assert scheme is not None
        lane_k = 16 if scheme.bits == 8 else 32
        group = scheme.group_size
        self.unit_k = 4 * lane_k
        self.step_k = units * self.unit_k
        self.steps = -(-problem.k // self.step_k)
        self.chunk_steps = -(-self.steps // chunks)
        self.parts = max(1, lane_k // group)
        self.spans = 4 if group < lane_k else max(1, self.unit_k // group)
        self.sets = -(-problem.rows * self.spans // 8)
        self.passes = -(-self.chunk_steps * self.step_k // 8 // 32)
        paired = 2 if scheme.has_zeros else 1
        self.stage = 2 * units * 4 * lane_k * scheme.bits + self._records(
            problem.k, group, paired * scheme.scale.itemsize
        )
        if scheme.has_super_blocks:
            self.stage += self._records(problem.k, SUPER_BLOCK, paired * 2)
        chunk_units = self.chunk_steps * units
        self.start_bytes = 32 + chunk_units * self.parts * self.sets * 4 * (16 if scheme.has_zeros else 8)
        self.x_bytes = chunk_units * self.unit_k * 2
        """Of a row of x, for a warp."""

    def _records(self, k: int, columns: int, each: int) -> int:
        """Bytes of a stage for 16 rows' records of `each` bytes for so many columns."""
        row, step = k // columns * each, max(1, self.step_k // columns) * each
        together = row | step | VECTOR
        alignment = together & -together
        return _TILE_ROWS * -(-(VECTOR - alignment + step) // VECTOR) * VECTOR

    def operand(self, rows: int) -> int:
        """Bytes that a block needs for so many rows of x."""
        return WARPS * (self.start_bytes + (self.x_bytes + 64) * rows)


def candidates(chip: Chip, problem: Problem) -> Iterator[tuple[float, Plan]]:
    """Every sensible way to compute a product, with what a warp does for it."""
    for units in UNITS:
        for chunks in (1, 2, 4, 8):
            found = make_plan(chip, problem, chunks, units)
            if found is not None:
                yield _cost(problem, found), found


def make_plan(
    chip: Chip,
    problem: Problem,
    chunks: int,
    units: int,
    stages: int | None = None,
    *,
    beside: bool = False,
) -> Plan | None:
    """A plan with a given number of warps for a row, or None if the kernel or the chip has no room for it.

    Args:
        chip: the GPU.
        problem: the product.
        chunks: warps that share a row: 1, 2, 4 or 8.
        units: of 64 bytes of 4- or 8-bit codes, in a stage of the ring.
        stages: of the ring; default: enough to fetch ahead smoothly.
        beside: take less than half of a multiprocessor's shared memory if possible, so that the next kernel
            can fill its ring while this one works.
    """
    if not _fits(problem, units):
        return None
    shape = Shape(problem, chunks, units)
    if chunks > shape.steps or shape.passes > _MAX_PASSES or (shape.sets > 2 and units > 2):
        return None
    output_bytes = tile_sums_bytes(problem, chunks, problem.rows, 1000) // 1000
    grid, share, extra = deal(chip, problem.outputs, output_bytes)
    most = share + (extra > 0)
    other = shape.operand(problem.rows) + tile_sums_bytes(problem, chunks, problem.rows, most)
    stage, limit = WARPS * shape.stage, chip.max_shared_bytes - STATIC_BYTES
    if stages is None:
        wanted = _stages_wanted(problem, shape, chunks, most)
        stages = ring_stages(chip, other, stage, wanted, beside=beside)
    if stages < 2 or other + stages * stage > limit:
        return None
    shared = other + stages * stage
    if not (beside and shared <= half(chip)):
        shared = max(shared, alone(chip))
    general = problem._replace(outputs=0, rows=0)
    paced = pace(stages, stage)
    kernel = _kernel(general, chunks, units, stages, paced, shape.sets, _fit_twice(problem, shape))
    return Plan(kernel, "codes", chunks, stages, grid, shared, share, extra, units=units)


def stages_of_a_warp(problem: Problem, found: Plan) -> tuple[int, int]:
    """Stages that the busiest warp multiplies, and bytes that all warps fetch for one each."""
    shape = Shape(problem, found.chunks, found.units)
    return _stages(problem, shape, found.chunks, found.most), WARPS * shape.stage


def _fits(problem: Problem, units: int) -> bool:
    scheme = problem.scheme
    if scheme is None or problem.activation.itemsize != 2 or not problem.vectors_of_x:
        return False
    if units > max_units(scheme):
        return False
    group, unit = scheme.group_size, 64 if scheme.bits == 8 else 128
    step = units * unit
    if not _divide(group, unit) or not _divide(group, step) or not _divide(group, unit // 4):
        return False
    return not scheme.has_super_blocks or _divide(step, SUPER_BLOCK)


def max_units(scheme: Scheme) -> int:
    """Of a stage: as many as registers suffice for."""
    return 2 if scheme.bits not in (4, 8) or scheme.has_zeros or scheme.has_super_blocks else 4


def _fit_twice(problem: Problem, shape: Shape) -> bool:
    """Whether a multiprocessor has registers for two blocks."""
    return shape.sets == 1 and shape.passes <= _TWO_BLOCKS_PASSES[problem.prologue]


def _divide(a: int, b: int) -> bool:
    """Whether one is a multiple of the other."""
    return a % b == 0 or b % a == 0


def _tiles(problem: Problem, outputs: int) -> int:
    return -(-outputs * problem.halves // _TILE_ROWS)


def _stages(problem: Problem, shape: Shape, chunks: int, outputs: int) -> int:
    """That the busiest warp multiplies, of a block with so many outputs."""
    return -(-_tiles(problem, outputs) // (WARPS // chunks)) * shape.chunk_steps


def _stages_wanted(problem: Problem, shape: Shape, chunks: int, outputs: int) -> int:
    """Of the ring, for a block with so many outputs."""
    all_stages = _stages(problem, shape, chunks, outputs)
    freely = _AHEAD_BYTES // (WARPS * shape.stage)
    return max(2, min(all_stages, max(freely, math.ceil(_AHEAD_SHARE * all_stages))))


def _cost(problem: Problem, found: Plan) -> float:
    """What the busiest warp does, about."""
    shape = Shape(problem, found.chunks, found.units)
    tiles = -(-_tiles(problem, found.most) // (WARPS // found.chunks))
    of_tile = shape.chunk_steps * found.units * _UNIT_COST[found.units] * (1 + (shape.sets - 1) / 2)
    of_x = shape.passes * problem.rows * _PASS_COST
    cost = tiles * (of_tile + _TILE_COST) + of_x + found.chunks / 100
    if shape.sets == 1 and not _fit_twice(problem, shape):
        cost *= 1.5
    # Two stages do where they hold much of what is to be read.
    enough = min(3, _stages_wanted(problem, shape, found.chunks, found.most))
    return cost if found.stages >= enough else cost * 1.5


@cache
def _kernel(
    problem: Problem, chunks: int, units: int, stages: int, paced: int, sets: int, two_blocks: bool
) -> Kernel:
    scheme = problem.format
    assert isinstance(scheme, Scheme)
    return Kernel(
        _SOURCE, "gemv_codes",
        GROUP=scheme.group_size, CHUNKS=chunks, UNITS=units, STAGES=stages, PACE=paced, SETS=sets,
        MIN_BLOCKS=2 if two_blocks else 1, **template(scheme), **problem.parameters,
    )  # fmt: skip
