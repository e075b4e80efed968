"""How a product of one row of x with codes of 4 or 8 bits is cut up for one GPU; see gemv_digits.cu.

Plain arithmetic on sizes, without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.driver import Chip
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.core import DType
from kuiperllm.ops.linear.gemv_problem import (
    RESERVED_BYTES,
    STATIC_BYTES,
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
from kuiperllm.quant import Scheme

UNITS = (2, 4, 8)
_SOURCE = Path(__file__).with_name("gemv_digits.cu")
_TILE_ROWS = 16
_SPAN_BYTES = 32  # of a row, that a unit of a stage has
_RECORDS_BYTES = 16  # of a row's scales, in a stage
_PAIR_OF_PRODUCTS = 64  # columns, whose digits a lane loads at once
_COPIES = (4, 8, 16)  # bytes that can be copied at once
_MAX_PASSES = 8  # vectors of x that a lane holds in registers
_TWO_BLOCKS_PASSES = {"PLAIN": 8, "NORM": 4, "MERGE": 4}  # up to so many, the registers of two blocks fit
_LONG_SHARE = 300 << 10  # bytes of codes for each multiprocessor
_STAGES = 3  # of the ring: deeper ones took up to 3 % longer

# What a warp does, about, in spans of 16 rows; for each of them with so many columns in a stage.
_SPAN_COST = {512: 1.1, 256: 1.0, 128: 1.25, 64: 1.5}
_TILE_COST = 0.25
_PASS_COST = 8.0


class Shape:
    """The sizes that the kernel derives from its template parameters."""

    def __init__(self, problem: Problem, chunks: int, units: int) -> None:
        scheme = problem.scheme
        assert scheme is not None
        self.step_k = units * _SPAN_BYTES * 8 // scheme.bits
        self.steps = problem.k // self.step_k
        self.chunk_steps = -(-self.steps // chunks)
        self.passes = -(-self.chunk_steps * self.step_k // 8 // 32)
        self.record = self.step_k // scheme.group_size * 2
        self.stage = _TILE_ROWS * (units * _SPAN_BYTES + _RECORDS_BYTES)
        self.x_bytes = self.chunk_steps * self.step_k * 3
        """Of x, for a warp."""


def candidates(chip: Chip, problem: Problem) -> Iterator[tuple[float, Plan]]:
    """Every sensible way to compute a product, with what a warp does for it."""
    beside = is_between_products(problem) and not _is_long(chip, problem)
    for units in UNITS:
        for chunks in (1, 2, 4, 8):
            found = make_plan(chip, problem, chunks, units, beside=beside)
            if found is not None:
                yield _cost(problem, found), found


def is_between_products(problem: Problem) -> bool:
    """Whether the kernels in front of a product and behind it are products: not attention, nor a step's end.

    Such kernels may have two blocks of a multiprocessor, one of each of two kernels: a ring fills while
    another one is used. Beside attention's small blocks, two of one kernel would often meet on a
    multiprocessor while another had none.
    """
    return (problem.prologue, problem.epilogue) in (("NORM", "SWIGLU"), ("PLAIN", "ADD"))


def _is_long(chip: Chip, problem: Problem) -> bool:
    """Whether a product has so much to read that a deeper ring gains more than an early start.

    Not for gates: the attention's projection in front of them has little to read.
    """
    codes = (
        problem.outputs * problem.k * problem.format.bits // 8 if isinstance(problem.format, Scheme) else 0
    )
    return problem.prologue == "PLAIN" and codes > _LONG_SHARE * chip.multiprocessors


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
        units: of 32 bytes of codes, in a stage of the ring.
        stages: of the ring; default: enough to fetch ahead smoothly.
        beside: take less than half of a multiprocessor's shared memory if possible, so that the next kernel
            can fill its ring while this one works, but more than a third: no two blocks of one kernel are to
            share one.
    """
    if not _fits(problem, units):
        return None
    shape = Shape(problem, chunks, units)
    if chunks > shape.steps or shape.passes > _MAX_PASSES:
        return None
    output_bytes = tile_sums_bytes(problem, chunks, 1, 1000) // 1000
    grid, share, extra = deal(chip, problem.outputs, output_bytes)
    most = share + (extra > 0)
    other = WARPS * shape.x_bytes + tile_sums_bytes(problem, chunks, 1, most)
    stage, limit = WARPS * shape.stage, chip.max_shared_bytes - STATIC_BYTES
    if stages is None:
        wanted = max(2, min(_stages(problem, shape, chunks, most), _STAGES))
        stages = ring_stages(chip, other, stage, wanted, beside=beside)
    if stages < 2 or other + stages * stage > limit:
        return None
    shared = other + stages * stage
    third = chip.shared_bytes_per_multiprocessor // 3 - RESERVED_BYTES + 16
    shared = max(shared, third if beside and shared <= half(chip) else alone(chip))
    two_blocks = shape.passes <= _TWO_BLOCKS_PASSES[problem.prologue]
    kernel = _kernel(problem._replace(outputs=0), chunks, units, stages, pace(stages, stage), two_blocks)
    return Plan(kernel, "digits", chunks, stages, grid, shared, share, extra, units=units)


def stages_of_a_warp(problem: Problem, found: Plan) -> tuple[int, int]:
    """Stages that the busiest warp multiplies, and bytes that all warps fetch for one each."""
    shape = Shape(problem, found.chunks, found.units)
    return _stages(problem, shape, found.chunks, found.most), WARPS * shape.stage


def _fits(problem: Problem, units: int) -> bool:
    scheme = problem.scheme
    if scheme is None or problem.rows != 1 or problem.activation.itemsize != 2 or not problem.vectors_of_x:
        return False
    if scheme.bits not in (4, 8) or scheme.coding != "middle" or scheme.scale is not DType.float16:
        return False
    shape = Shape(problem, 1, units)
    if scheme.group_size not in (32, 64, 128) or shape.step_k % scheme.group_size:
        return False
    if problem.k % shape.step_k or shape.step_k % _PAIR_OF_PRODUCTS:
        return False
    row_of_scales = problem.k // scheme.group_size * 2
    return shape.record in _COPIES and row_of_scales % shape.record == 0


def _tiles(problem: Problem, chunks: int, outputs: int) -> int:
    """Of the busiest warp."""
    of_block = -(-outputs * problem.halves // _TILE_ROWS)
    return -(-of_block // (WARPS // chunks))


def _stages(problem: Problem, shape: Shape, chunks: int, outputs: int) -> int:
    """That the busiest warp multiplies, of a block with so many outputs."""
    return _tiles(problem, chunks, outputs) * shape.chunk_steps


def _cost(problem: Problem, found: Plan) -> float:
    """What the busiest warp does, about."""
    shape = Shape(problem, found.chunks, found.units)
    of_tile = shape.chunk_steps * found.units * _SPAN_COST[shape.step_k] + _TILE_COST
    return _tiles(problem, found.chunks, found.most) * of_tile + shape.passes * _PASS_COST


@cache
def _kernel(problem: Problem, chunks: int, units: int, stages: int, paced: int, two_blocks: bool) -> Kernel:
    scheme = problem.format
    assert isinstance(scheme, Scheme)
    return Kernel(
        _SOURCE, "gemv_digits",
        BITS=scheme.bits, GROUP=scheme.group_size, CHUNKS=chunks, UNITS=units, STAGES=stages,
        MIN_BLOCKS=2 if two_blocks else 1, PACE=paced, **problem.parameters,
    )  # fmt: skip
