"""Products with few rows of x, apart from addresses, and how they can be launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from kuiperllm.backends.cuda.driver import Chip
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.backends.cuda.sources import Parameter
from kuiperllm.core import DType
from kuiperllm.ops.linear.weight import WeightFormat
from kuiperllm.quant import Scheme

MAX_GEMV_ROWS = 8
"""Of x: more than the kernels take are a GEMM's."""

WARPS = 8
THREADS = 32 * WARPS
VECTOR = 16
"""Bytes that a lane copies at once."""
STATIC_BYTES = 512
"""Of shared memory, at most."""
RESERVED_BYTES = 1024
"""Of a multiprocessor's shared memory, taken by the driver for each block."""
SUMS_BYTES = 40 << 10
"""At most, for the sums of a block; with more outputs, multiprocessors get several blocks."""

_BLOCK_SHARE = 0.875  # of a multiprocessor's shared memory: the kernel in front keeps room for small blocks

Method = Literal["vector", "tensor", "digits", "codes"]


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
    def scheme(self) -> Scheme | None:
        """How the matrix is quantized, if it is."""
        return self.format if isinstance(self.format, Scheme) else None

    @property
    def halves(self) -> int:
        """Rows of the matrix that make an output."""
        return 2 if self.epilogue == "SWIGLU" else 1

    @property
    def vectors_of_x(self) -> bool:
        """Whether x is made of whole vectors, each of one head where heads are merged."""
        of_head = self.head_dim if self.prologue == "MERGE" else 0
        return (
            (self.k * self.activation.itemsize) % VECTOR == 0 == (of_head * self.activation.itemsize) % VECTOR
        )

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The template parameters that all kernels have."""
        return {
            "T": self.activation,
            "OUT": self.out,
            "K": self.k,
            "PROLOGUE": self.prologue,
            "EPILOGUE": self.epilogue,
            "HAS_BIAS": self.bias,
            "SPLITS": self.splits,
            "HEAD_DIM": self.head_dim or self.k,
        }


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
    launch_after: int = 0
    """Stages that a warp multiplies before the next kernel may start (but method `tensor`)."""
    units: int = 0
    """Of 64 bytes of codes, in a stage (method `codes`); of 32 bytes (method `digits`)."""

    @property
    def most(self) -> int:
        """Outputs of the block that has most."""
        return self.share + (self.extra > 0)


def deal(chip: Chip, outputs: int, output_bytes: int) -> tuple[int, int, int]:
    """Blocks, outputs of each, and blocks that have one more, where an output's sums take so many bytes."""
    waves = -(-outputs // (chip.multiprocessors * max(1, SUMS_BYTES // output_bytes)))
    grid = min(outputs, waves * chip.multiprocessors)
    return grid, *divmod(outputs, grid)


def alone(chip: Chip) -> int:
    """Shared memory with which no two blocks of a launch share a multiprocessor: more than half of it."""
    least = chip.shared_bytes_per_multiprocessor // 2 - RESERVED_BYTES + 16
    return min(least, chip.max_shared_bytes - STATIC_BYTES)


def half(chip: Chip) -> int:
    """Shared memory with which two blocks share a multiprocessor."""
    return chip.shared_bytes_per_multiprocessor // 2 - RESERVED_BYTES - STATIC_BYTES


def ring_stages(chip: Chip, other: int, stage: int, wanted: int, *, beside: bool) -> int:
    """Stages of a ring: the number wanted, or as many as fit; fewer than 2: there is no room for one.

    Args:
        chip: the GPU.
        other: bytes that a block needs besides.
        stage: bytes of a stage.
        wanted: stages.
        beside: whether half of a multiprocessor is to suffice, if two stages fit there.
    """
    rooms = (
        half(chip) if beside else 0,
        int(chip.shared_bytes_per_multiprocessor * _BLOCK_SHARE),
        chip.max_shared_bytes - STATIC_BYTES,
    )
    most = next((found for room in rooms if (found := (room - other) // stage) >= 2), 0)
    return min(most, wanted)


def pace(stages: int, stage: int, most: int = 40 << 10) -> int:
    """Of a ring's stages, each of so many bytes: how many to have under way while it is filled at first.

    Args:
        most: bytes that are under way in a multiprocessor when memory is as fast as it can be.
    """
    return max(1, min(stages, most // stage))


def tile_sums_bytes(problem: Problem, chunks: int, slots: int, outputs: int) -> int:
    """Of the sums of a block with so many outputs, where tensor cores make tiles of 16 rows.

    Args:
        problem: the product.
        chunks: warps that share a row.
        slots: rows of x that there is room for.
        outputs: of the block.
    """
    return 4 * problem.halves * chunks * slots * ((outputs + 16) // 16 * 16 + 4)
