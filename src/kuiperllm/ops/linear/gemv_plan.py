"""How a product with few rows of x is cut up for one GPU: kernel, warps for a row, depth of the ring.

Plain arithmetic on sizes, without a GPU. Quantized weights are `gemv_digits_plan`'s and `gemv_codes_plan`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.driver import Chip
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.core import DType
from kuiperllm.ops.linear import gemv_codes_plan, gemv_digits_plan
from kuiperllm.ops.linear.gemv_problem import (
    MAX_GEMV_ROWS,
    STATIC_BYTES,
    VECTOR,
    WARPS,
    Method,
    Plan,
    Problem,
    alone,
    deal,
    pace,
    tile_sums_bytes,
)

TENSOR_CORE_ROWS = 2
"""From so many rows of x on, tensor cores multiply what they can."""

_RING_SHARE = 0.75  # of a multiprocessor's shared memory
_BLOCK_SHARE = 0.875  # of the same: the kernel in front keeps room for blocks of its own
_GOOD_STAGES = 4  # of the ring: as many as it takes to fetch ahead smoothly
_AHEAD_SHARE = 0.6  # of what a block reads is fetched ahead at most: all at once took up to 20 % longer
_PACE_BYTES = 80_000  # that are under way while a ring is filled at first
_SMALL_SHARE = 160 << 10  # of the matrix, that a block reads: its ring may be filled at once
_FOLLOWED_BYTES = 128 << 10  # that a block has still to multiply when the choice of a token may start
_LANE_ELEMENTS = 128  # of x that a lane holds in registers
_TWO_BLOCKS_ELEMENTS = 88  # up to so many, the registers of two blocks fit
_MIN_ROW_BYTES = 2048  # longer rows are shared by at least two warps

# What a warp issues, about: for 16 bytes of a row in a lane, and for summing up a pair of rows.
_VECTOR_COST = {DType.float32: 12, DType.float16: 20, DType.bfloat16: 20}
_PAIR_COST = 40
_CHUNK_COST = 8  # for adding the chunks of a row
_X_RATE = 80  # elements of x that a block loads meanwhile: each group of warps loads all


def plan(chip: Chip, problem: Problem) -> Plan | None:
    """The best way to compute a product, or None if it is not one for the fast kernels."""
    methods: tuple[Method, ...] = ("vector", "tensor")
    if problem.scheme is not None:
        methods = ("digits", "codes")
    elif problem.rows >= TENSOR_CORE_ROWS:
        methods = ("tensor", "vector")
    for method in methods:
        best = min(candidates(chip, problem, method), key=lambda found: found[0], default=None)
        if best is not None:
            # Logits are followed by the choice of a token, which has nothing to fetch before they are there.
            return followed(problem, best[1], _FOLLOWED_BYTES) if problem.out is DType.float32 else best[1]
    return None


def candidates(chip: Chip, problem: Problem, method: Method) -> Iterator[tuple[float, Plan]]:
    """Every sensible way to compute a product by one method, with what a warp issues for it."""
    if method == "codes":
        yield from gemv_codes_plan.candidates(chip, problem)
        return
    if method == "digits":
        yield from gemv_digits_plan.candidates(chip, problem)
        return
    for chunks in (1, 2, 4, 8):
        if method == "vector":
            if chunks == 1 and _row_bytes(problem) > _MIN_ROW_BYTES:
                continue
            if _lane_elements(problem, chunks) > _LANE_ELEMENTS:
                continue
        found = make_plan(chip, problem, method, chunks)
        if found is not None:
            yield _cost(problem, found), found


def _itemsize(problem: Problem) -> int:
    """Of the matrix."""
    assert isinstance(problem.format, DType)
    return problem.format.itemsize


def _row_bytes(problem: Problem) -> int:
    return problem.k * _itemsize(problem)


def _fits(problem: Problem, method: Method) -> bool:
    if problem.scheme is not None or not problem.vectors_of_x or _row_bytes(problem) % VECTOR:
        return False
    itemsize = problem.activation.itemsize
    if method == "vector":
        return _itemsize(problem) <= itemsize
    return itemsize == 2 and problem.format is problem.activation


def make_plan(
    chip: Chip, problem: Problem, method: Method, chunks: int, stages: int | None = None
) -> Plan | None:
    """A plan for weights that are not quantized, with a given number of warps for a row.

    Args:
        chip: the GPU.
        problem: the product.
        method: `vector`: gemv.cu, `tensor`: gemv_mma.cu.
        chunks: warps that share a row: 1, 2, 4 or 8.
        stages: of the ring; default: as many as there is room for.

    Returns:
        None if the method is not for such a product, or shared memory does not suffice.
    """
    if not _fits(problem, method) or (method == "tensor" and chunks > _steps(problem)):
        return None
    grid, share, extra = deal(chip, problem.outputs, _sums_bytes(problem, method, chunks, 1000) // 1000)
    stage = WARPS * (_vector_stage(problem, chunks) if method == "vector" else _tensor_stage(problem))
    sums = _sums_bytes(problem, method, chunks, share + (extra > 0))
    other = _x_bytes(problem, method, problem.rows) + sums
    limit = chip.max_shared_bytes - STATIC_BYTES
    if stages is None:
        most = int(chip.shared_bytes_per_multiprocessor * _RING_SHARE)
        block = int(chip.shared_bytes_per_multiprocessor * _BLOCK_SHARE)
        rooms = [block - other, limit - other]
        if method == "tensor":  # one kernel for any number of rows, if there is room for all
            rooms.insert(0, block - sums - _x_bytes(problem, method, MAX_GEMV_ROWS))
        stages = next((min(most, room) // stage for room in rooms if room >= _GOOD_STAGES * stage), 0)
        if stages < 2:
            stages = min(most, rooms[-1]) // stage
        if stages < 2:
            return None
        if method == "vector":
            pairs = _pairs(problem, chunks, share + (extra > 0))
            stages = min(stages, _stages_wanted(pairs))
    if other + stages * stage > limit:
        return None
    shared = max(other + stages * stage, alone(chip))
    general = problem._replace(outputs=0, rows=0 if method == "tensor" else problem.rows)
    outputs_bytes = (share + (extra > 0)) * problem.halves * _row_bytes(problem)
    paced = stages if outputs_bytes <= _SMALL_SHARE else pace(stages, stage, _PACE_BYTES)
    kernel = _kernel(general, method, chunks, stages, paced)
    return Plan(kernel, method, chunks, stages, grid, shared, share, extra)


def followed(problem: Problem, found: Plan, left: int | None) -> Plan:
    """A plan after which the next kernel starts early; method `tensor` always lets it start at once.

    Args:
        problem: the product.
        found: the plan.
        left: bytes that a block has still to multiply when the next kernel may start; None: all.
    """
    if left is None or found.method == "tensor":
        return replace(found, launch_after=0)
    if found.method == "codes":
        stages, stage_bytes = gemv_codes_plan.stages_of_a_warp(problem, found)
    elif found.method == "digits":
        stages, stage_bytes = gemv_digits_plan.stages_of_a_warp(problem, found)
    else:
        stages = _pairs(problem, found.chunks, found.most)
        stage_bytes = WARPS // found.chunks * 2 * _row_bytes(problem)
    return replace(found, launch_after=max(0, stages - left // stage_bytes))


# --- gemv.cu ----------------------------------------------------------------------------------------------


def _chunk_vectors(problem: Problem, chunks: int) -> int:
    return -(-_row_bytes(problem) // VECTOR // chunks)


def _lane_elements(problem: Problem, chunks: int) -> int:
    if problem.rows > 1:
        return 0
    return -(-_chunk_vectors(problem, chunks) // 32) * (VECTOR // _itemsize(problem))


def _vector_stage(problem: Problem, chunks: int) -> int:
    """Bytes of a stage of one warp's ring: two chunks."""
    return 2 * _chunk_vectors(problem, chunks) * VECTOR


def _pairs(problem: Problem, chunks: int, outputs: int) -> int:
    """Of rows of the matrix, for the busiest warp of a block with so many outputs."""
    return -(-(-(-outputs * chunks // WARPS) * problem.halves) // 2)


def _stages_wanted(pairs: int) -> int:
    return max(2, math.ceil(_AHEAD_SHARE * pairs))


# --- gemv_mma.cu ------------------------------------------------------------------------------------------

_UNITS = 2  # of 64 bytes of a row, in a stage


def _tensor_stage(problem: Problem) -> int:
    return _UNITS * 512 * (3 if problem.prologue == "PLAIN" else 2)


def _steps(problem: Problem) -> int:
    return -(-_row_bytes(problem) // (64 * _UNITS))


# --- both -------------------------------------------------------------------------------------------------


def _x_bytes(problem: Problem, method: Method, rows: int) -> int:
    """Of so many rows of x in shared memory."""
    if method == "vector":
        return 0 if rows == 1 and problem.prologue == "PLAIN" else rows * problem.k * 4
    if problem.prologue == "PLAIN":
        return 0
    return rows * _steps(problem) * _UNITS * 4 * VECTOR


def _sums_bytes(problem: Problem, method: Method, chunks: int, outputs: int) -> int:
    """Of the sums of a block with so many outputs."""
    if method == "vector":
        return 4 * problem.halves * chunks * problem.rows * (outputs + 1)
    return tile_sums_bytes(problem, chunks, MAX_GEMV_ROWS, outputs)


def _cost(problem: Problem, found: Plan) -> float:
    """What the busiest warp issues, about."""
    groups, outputs = WARPS // found.chunks, found.most
    if found.method == "tensor":
        tiles = -(-outputs * problem.halves // 16)
        return -(-tiles // groups) * (-(-_steps(problem) // found.chunks) + 0.5) + found.chunks / 100
    assert isinstance(problem.format, DType)
    rows, pairs = -(-outputs // groups) * problem.halves, _pairs(problem, found.chunks, outputs)
    steps = -(-_chunk_vectors(problem, found.chunks) // 32)
    cost: float = rows * steps * _VECTOR_COST[problem.format] * problem.rows + pairs * _PAIR_COST
    cost += groups * problem.k / _X_RATE + found.chunks * _CHUNK_COST
    # Two stages do where there is no room for three, or where they hold much of what is to be read.
    return cost if found.stages >= min(3, _stages_wanted(pairs)) else cost * 1.5


_SOURCES: dict[Method, Path] = {
    "vector": Path(__file__).with_name("gemv.cu"),
    "tensor": Path(__file__).with_name("gemv_mma.cu"),
}


@cache
def _kernel(problem: Problem, method: Method, chunks: int, stages: int, paced: int) -> Kernel:
    parameters = problem.parameters | {"CHUNKS": chunks, "STAGES": stages, "PACE": paced}
    if method == "tensor":
        return Kernel(_SOURCES[method], "gemv_mma", **parameters)
    assert isinstance(problem.format, DType)
    blocks = 2 if _lane_elements(problem, chunks) <= _TWO_BLOCKS_ELEMENTS else 1
    return Kernel(
        _SOURCES[method], "gemv", W=problem.format, ROWS=problem.rows, MIN_BLOCKS=blocks, **parameters
    )
