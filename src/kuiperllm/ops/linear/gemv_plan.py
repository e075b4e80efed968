"""How a product with few rows of x is cut up for one GPU: kernel, warps for a row, depth of the ring.

Plain arithmetic on sizes, without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from kuiperllm.backends.cuda.driver import Chip
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.backends.cuda.sources import Parameter
from kuiperllm.core import DType
from kuiperllm.ops.linear.weight import WeightFormat
from kuiperllm.quant import Scheme

MAX_GEMV_ROWS = 8
"""Up to so many rows of x, a product is limited by reading the matrix, and is a GEMV's; beyond, a GEMM's."""

TENSOR_CORE_ROWS = 2
"""From so many rows of x on, tensor cores multiply what they can."""

WARPS = 8
THREADS = 32 * WARPS
_VECTOR = 16  # bytes that a lane copies at once
_STATIC_BYTES = 512  # of shared memory, at most
_RESERVED_BYTES = 1024  # of a multiprocessor's shared memory, taken by the driver for each block
_RING_SHARE = 0.75  # of a multiprocessor's shared memory
_BLOCK_SHARE = 0.875  # of the same: the kernel in front keeps room for blocks of its own
_SUMS_BYTES = (
    40 << 10
)  # at most, for the sums of a block; with more outputs, multiprocessors get several blocks
_GOOD_STAGES = 4  # of the ring: as many as it takes to fetch ahead smoothly
_AHEAD_SHARE = 0.6  # of what a block reads is fetched ahead at most: all at once took up to 20 % longer
_FOLLOWED_BYTES = 128 << 10  # that a block has still to multiply when a small kernel may start beside it
_LANE_ELEMENTS = 128  # of x that a lane holds in registers
_TWO_BLOCKS_ELEMENTS = 88  # up to so many, the registers of two blocks fit
_MIN_ROW_BYTES = 2048  # longer rows are shared by at least two warps

# What a warp issues, about: for 16 bytes of a row in a lane, and for summing up a pair of rows.
_VECTOR_COST = {DType.float32: 12, DType.float16: 20, DType.bfloat16: 20, DType.int8: 60}
_PAIR_COST = 40
_CHUNK_COST = 8  # for adding the chunks of a row
_X_RATE = 80  # elements of x that a block loads meanwhile: each group of warps loads all

Method = Literal["vector", "tensor"]


class Problem(NamedTuple):
    """A product, apart from addresses."""

    rows: int
    """Of x."""
    outputs: int
    """For each of them: rows of the matrix, or half as many if `swiglu`."""
    k: int
    """Columns of the matrix."""
    format: WeightFormat
    activation: DType
    out: DType
    bias: bool
    prologue: str
    """`PLAIN`, `NORM` or `MERGE`; see gemv.cuh."""
    epilogue: str
    """`STORE`, `ADD` or `SWIGLU`."""
    splits: int = 1
    head_dim: int = 0

    @property
    def weight(self) -> DType:
        """The type of the matrix's elements."""
        return DType.int8 if isinstance(self.format, Scheme) else self.format

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 if the matrix is not quantized."""
        return self.format.group_size if isinstance(self.format, Scheme) else 0

    @property
    def scales(self) -> DType:
        """The type of scales."""
        return self.format.scale if isinstance(self.format, Scheme) else DType.float16

    @property
    def row_bytes(self) -> int:
        """Of the matrix."""
        return self.k * self.weight.itemsize

    @property
    def halves(self) -> int:
        """Rows of the matrix that make an output."""
        return 2 if self.epilogue == "SWIGLU" else 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A launch, apart from its arguments."""

    kernel: Kernel
    method: Method
    chunks: int
    """Warps that share a row of the matrix."""
    stages: int
    """Of the ring."""
    grid: int
    shared: int
    """Bytes of shared memory."""
    share: int
    """Outputs of a block."""
    extra: int
    """Blocks that have one more."""
    launch_after: int
    """Pairs of rows that a warp multiplies before the next kernel may start (method `vector`)."""


def plan(chip: Chip, problem: Problem) -> Plan | None:
    """The best way to compute a product, or None if it is not one for the fast kernels."""
    methods: tuple[Method, ...] = ("vector", "tensor")
    if problem.rows >= TENSOR_CORE_ROWS:
        methods = ("tensor", "vector")
    for method in methods:
        best = min(candidates(chip, problem, method), key=lambda found: found[0], default=None)
        if best is not None:
            return best[1]
    return None


def candidates(chip: Chip, problem: Problem, method: Method) -> Iterator[tuple[float, Plan]]:
    """Every sensible way to compute a product by one method, with what a warp issues for it."""
    if not _fits(problem, method):
        return
    for chunks in (1, 2, 4, 8):
        if method == "vector":
            if chunks == 1 and problem.row_bytes > _MIN_ROW_BYTES:
                continue
            if _lane_elements(problem, chunks) > _LANE_ELEMENTS:
                continue
        found = make_plan(chip, problem, method, chunks)
        if found is not None:
            yield _cost(problem, found), found


def _fits(problem: Problem, method: Method) -> bool:
    itemsize = problem.activation.itemsize
    if problem.k * itemsize % _VECTOR or problem.row_bytes % _VECTOR:
        return False
    if problem.prologue == "MERGE" and problem.head_dim * itemsize % _VECTOR:
        return False
    if problem.group and (problem.group % 16 or 256 % problem.group):
        return False
    if method == "vector":
        return problem.weight.itemsize <= itemsize
    if problem.group:
        halves_a_unit = problem.group == 32 and problem.scales is DType.float16
        return itemsize == 2 and problem.k % 64 == 0 and (problem.group % 64 == 0 or halves_a_unit)
    return itemsize == 2 and problem.weight is problem.activation


def make_plan(
    chip: Chip, problem: Problem, method: Method, chunks: int, stages: int | None = None
) -> Plan | None:
    """A plan with a given number of warps for a row, or None if its shared memory does not suffice.

    Args:
        chip: the GPU.
        problem: the product.
        method: `vector`: gemv.cu, `tensor`: gemv_mma.cu.
        chunks: warps that share a row: 1, 2, 4 or 8.
        stages: of the ring; default: as many as there is room for.
    """
    if method == "tensor" and chunks > _steps(problem):
        return None
    grid, share, extra = _deal(chip, problem, method, chunks)
    stage = WARPS * (_vector_stage(problem, chunks) if method == "vector" else _tensor_stage(problem))
    sums = _sums_bytes(problem, method, chunks, share + (extra > 0))
    other = _x_bytes(problem, method, problem.rows) + sums
    limit = chip.max_shared_bytes - _STATIC_BYTES
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
    # More than half of what a multiprocessor has, so that no two blocks of a launch share one.
    alone = chip.shared_bytes_per_multiprocessor // 2 - _RESERVED_BYTES + 16
    shared = max(other + stages * stage, min(alone, limit))
    general = problem._replace(outputs=0, rows=0 if method == "tensor" else problem.rows)
    kernel = _kernel(general, method, chunks, stages)
    found = Plan(kernel, method, chunks, stages, grid, shared, share, extra, 0)
    # What follows a product that is only stored is small and fits beside it: attention, or choosing a token.
    is_followed = method == "vector" and (problem.prologue, problem.epilogue) == ("NORM", "STORE")
    return followed(problem, found, _FOLLOWED_BYTES) if is_followed else found


def followed(problem: Problem, found: Plan, left: int | None) -> Plan:
    """A plan (method `vector`) after which the next kernel starts early.

    Args:
        problem: the product.
        found: the plan.
        left: bytes that a block has still to multiply when the next kernel may start; None: all.
    """
    pairs = _pairs(problem, found.chunks, found.share + (found.extra > 0))
    pair_bytes = WARPS // found.chunks * 2 * problem.row_bytes
    return replace(found, launch_after=0 if left is None else max(0, pairs - left // pair_bytes))


def _deal(chip: Chip, problem: Problem, method: Method, chunks: int) -> tuple[int, int, int]:
    """Blocks, outputs of each, and blocks that have one more."""
    outputs, multiprocessors = problem.outputs, chip.multiprocessors
    output_bytes = _sums_bytes(problem, method, chunks, 1000) // 1000
    waves = -(-outputs // (multiprocessors * max(1, _SUMS_BYTES // output_bytes)))
    grid = min(outputs, waves * multiprocessors)
    return grid, *divmod(outputs, grid)


# --- gemv.cu ----------------------------------------------------------------------------------------------


def _chunk_vectors(problem: Problem, chunks: int) -> int:
    return -(-problem.row_bytes // _VECTOR // chunks)


def _lane_elements(problem: Problem, chunks: int) -> int:
    if problem.rows > 1:
        return 0
    return -(-_chunk_vectors(problem, chunks) // 32) * (_VECTOR // problem.weight.itemsize)


def _vector_stage(problem: Problem, chunks: int) -> int:
    """Bytes of a stage of one warp's ring: two chunks, with a word for the scale of each vector."""
    vectors = _chunk_vectors(problem, chunks)
    scales = -(-vectors * 4 // 16) * 16 if problem.group else 0
    return 2 * (vectors * _VECTOR + scales)


def _pairs(problem: Problem, chunks: int, outputs: int) -> int:
    """Of rows of the matrix, for the busiest warp of a block with so many outputs."""
    return -(-(-(-outputs * chunks // WARPS) * problem.halves) // 2)


def _stages_wanted(pairs: int) -> int:
    return max(2, math.ceil(_AHEAD_SHARE * pairs))


# --- gemv_mma.cu ------------------------------------------------------------------------------------------

_UNITS = 2  # of 64 bytes of a row, in a stage


def _x_vectors(problem: Problem) -> int:
    return 2 if problem.group else 1  # of x, for 16 bytes of the matrix


def _tensor_stage(problem: Problem) -> int:
    rows = 2 * (512 + (128 if problem.group else 0))
    x = 512 * _x_vectors(problem) if problem.prologue == "PLAIN" else 0
    return _UNITS * (rows + x)


def _steps(problem: Problem) -> int:
    return -(-problem.row_bytes // (64 * _UNITS))


# --- both -------------------------------------------------------------------------------------------------


def _x_bytes(problem: Problem, method: Method, rows: int) -> int:
    """Of so many rows of x in shared memory."""
    if method == "vector":
        return 0 if rows == 1 and problem.prologue == "PLAIN" else rows * problem.k * 4
    if problem.prologue == "PLAIN":
        return 0
    return rows * _steps(problem) * _UNITS * 4 * _VECTOR * _x_vectors(problem)


def _sums_bytes(problem: Problem, method: Method, chunks: int, outputs: int) -> int:
    """Of the sums of a block with so many outputs."""
    if method == "vector":
        return 4 * problem.halves * chunks * problem.rows * (outputs + 1)
    return 4 * problem.halves * chunks * MAX_GEMV_ROWS * ((outputs + 16) // 16 * 16 + 4)


def _cost(problem: Problem, found: Plan) -> float:
    """What the busiest warp issues, about."""
    groups, outputs = WARPS // found.chunks, found.share + (found.extra > 0)
    if found.method == "tensor":
        tiles = -(-outputs * problem.halves // 16)
        return -(-tiles // groups) * (-(-_steps(problem) // found.chunks) + 0.5) + found.chunks / 100
    rows, pairs = -(-outputs // groups) * problem.halves, _pairs(problem, found.chunks, outputs)
    steps = -(-_chunk_vectors(problem, found.chunks) // 32)
    cost: float = rows * steps * _VECTOR_COST[problem.weight] * problem.rows + pairs * _PAIR_COST
    cost += groups * problem.k / _X_RATE + found.chunks * _CHUNK_COST
    # Two stages do where there is no room for three, or where they hold much of what is to be read.
    return cost if found.stages >= min(3, _stages_wanted(pairs)) else cost * 1.5


_SOURCES: dict[Method, Path] = {
    "vector": Path(__file__).with_name("gemv.cu"),
    "tensor": Path(__file__).with_name("gemv_mma.cu"),
}


@cache
def _kernel(problem: Problem, method: Method, chunks: int, stages: int) -> Kernel:
    parameters: dict[str, Parameter] = {
        "T": problem.activation,
        "W": problem.weight,
        "OUT": problem.out,
        "K": problem.k,
        "GROUP": problem.group,
        "SCALE": problem.scales,
        "PROLOGUE": problem.prologue,
        "EPILOGUE": problem.epilogue,
        "HAS_BIAS": problem.bias,
        "SPLITS": problem.splits,
        "HEAD_DIM": problem.head_dim or problem.k,
        "CHUNKS": chunks,
        "STAGES": stages,
    }
    if method == "tensor":
        return Kernel(_SOURCES[method], "gemv_mma", **parameters)
    blocks = 2 if _lane_elements(problem, chunks) <= _TWO_BLOCKS_ELEMENTS else 1
    return Kernel(_SOURCES[method], "gemv", ROWS=problem.rows, MIN_BLOCKS=blocks, **parameters)
