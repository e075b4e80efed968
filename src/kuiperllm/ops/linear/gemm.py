"""Launches matrix products for many rows of x on CUDA: the kernel that fits chip, types and alignment."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from kuiperllm.backends.cuda.launch import Kernel, chip, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear import gemm_hopper
from kuiperllm.ops.linear.cuda_weights import row_bytes
from kuiperllm.ops.linear.gemm_tiling import ACCUMULATE, PLAIN, SWIGLU
from kuiperllm.ops.linear.weight import LinearWeight, WeightFormat
from kuiperllm.quant import Scheme

_MMA = Path(__file__).with_name("gemm_mma.cu")
_SIMT = Path(__file__).with_name("gemm_simt.cu")
_RASTER = 8
_GROUPS = (32, 64, 128)
"""Group sizes of int8 weights that the tensor-core kernel takes."""


def gemm(
    x: Tensor, weight: LinearWeight, out: Tensor, *, accumulate: bool = False, swiglu: bool = False
) -> None:
    """out = x W^T + bias, or out += that, or silu(gate) * up of it.

    Args:
        x: [M, K]; the rows may be any distance apart.
        weight: [N, K].
        out: [M, N] in x's type or float32; the rows may be any distance apart.
        accumulate: add to what `out` holds.
        swiglu: the weights are N / 2 gate rows, then N / 2 up rows; out is [M, N / 2].
    """
    if not x.shape[0]:
        return
    epilogue = SWIGLU if swiglu else ACCUMULATE if accumulate else PLAIN
    if gemm_hopper.can_take(x, weight, epilogue):
        gemm_hopper.gemm(x, weight, out, epilogue)
    elif _can_use_mma(x, weight):
        gemm_mma(x, weight, out, epilogue)
    else:
        gemm_simt(x, weight, out, epilogue)


def _can_use_mma(x: Tensor, weight: LinearWeight) -> bool:
    if x.dtype is DType.float32 or x.shape[1] % 8 or x.address % 16 or (x.shape[0] > 1 and x.strides[0] % 8):
        return False
    return weight.format is x.dtype or weight.group_size in _GROUPS


# --- tensor cores -----------------------------------------------------------------------------------------


class MmaTile(NamedTuple):
    """A configuration of `gemm_mma.cu`."""

    m: int
    n: int
    warps: tuple[int, int, int]
    """Along M, N and K."""
    stages: int

    def shared_bytes(self, quantized: bool) -> int:
        """Shared memory of a block."""
        return self.stages * (self.m * 128 + self.n * (64 + 8 if quantized else 128))


MMA_TILES = (
    MmaTile(128, 128, (2, 4, 1), 3),
    MmaTile(64, 64, (2, 2, 1), 4),
    MmaTile(32, 32, (1, 1, 4), 6),
)
"""From large, for many tiles, to small, so that few rows of x still keep the chip busy."""


class _Plan(NamedTuple):
    """What of a launch follows from shapes and types."""

    kernel: Kernel
    tiles: tuple[int, int]
    threads: int
    shared: int


def gemm_mma(
    x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, tile: MmaTile | None = None
) -> None:
    """The product on tensor cores: x in 16 bits, weights in the same type or int8 groups, K % 8 == 0."""
    scales = weight.scales.dtype if weight.scales is not None else None
    plan = _mma_plan(
        x.shape[0], weight.out_features, x.dtype, out.dtype, epilogue, weight.bias is not None,
        weight.group_size, scales, tile, chip(x.device).multiprocessors,
    )  # fmt: skip
    launch(
        plan.kernel, plan.tiles[0] * plan.tiles[1], plan.threads,
        x, weight.data, weight.scales, weight.bias, out, x.shape[0], out.shape[1], x.shape[1],
        x.strides[0], _row(weight), out.strides[0], *plan.tiles, _RASTER, shared=plan.shared,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _mma_plan(
    m: int,
    n: int,
    dtype: DType,
    out_dtype: DType,
    epilogue: int,
    has_bias: bool,
    group: int,
    scales: DType | None,
    tile: MmaTile | None,
    multiprocessors: int,
) -> _Plan:
    def tiles(tile: MmaTile) -> tuple[int, int]:
        return -(-m // tile.m), -(-n // tile.n)

    def is_busy(tile: MmaTile) -> bool:
        along_m, along_n = tiles(tile)
        return m > tile.m // 2 and along_m * along_n * 4 >= multiprocessors * 3

    if tile is None:
        tile = next((tile for tile in MMA_TILES if is_busy(tile)), MMA_TILES[-1])
    warps_m, warps_n, warps_k = tile.warps
    kernel = Kernel(
        _MMA,
        "gemm",
        T=dtype,
        OUT=out_dtype,
        SCALE=scales or DType.float16,
        GROUP=group,
        TILE_M=tile.m,
        TILE_N=tile.n,
        WARPS_M=warps_m,
        WARPS_N=warps_n,
        WARPS_K=warps_k,
        STAGES=tile.stages,
        EPILOGUE=epilogue,
        BIAS=has_bias,
    )
    return _Plan(kernel, tiles(tile), 32 * warps_m * warps_n * warps_k, tile.shared_bytes(group > 0))


# --- any operands -----------------------------------------------------------------------------------------

SIMT_TILES = (128, 64)
"""Sides of the tiles of `gemm_simt.cu`."""


def gemm_simt(x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, tile: int | None = None) -> None:
    """The product with exact float32 products, of operands of any type and alignment."""
    k, group = x.shape[1], weight.group_size
    vector = 4 * x.itemsize
    load = 4
    if k % 4 or group % 4 or x.address % vector or (x.shape[0] > 1 and x.strides[0] % 4):
        load = 1
    scales = weight.scales.dtype if weight.scales is not None else None
    plan = _simt_plan(
        x.shape[0], weight.out_features, x.dtype, weight.format, scales, out.dtype, epilogue,
        weight.bias is not None, load, tile, chip(x.device).multiprocessors,
    )  # fmt: skip
    launch(
        plan.kernel, plan.tiles[0] * plan.tiles[1], plan.threads,
        x, weight.data, weight.scales, weight.bias, out, x.shape[0], out.shape[1], k,
        x.strides[0], _row(weight), out.strides[0], group, *plan.tiles, _RASTER,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _simt_plan(
    m: int,
    n: int,
    dtype: DType,
    format: WeightFormat,
    scales: DType | None,
    out_dtype: DType,
    epilogue: int,
    has_bias: bool,
    load: int,
    tile: int | None,
    multiprocessors: int,
) -> _Plan:
    def tiles(side: int) -> tuple[int, int]:
        return -(-m // side), -(-n // side)

    if tile is None:
        along_m, along_n = tiles(SIMT_TILES[0])
        tile = SIMT_TILES[0] if along_m * along_n >= multiprocessors else SIMT_TILES[1]
    kernel = Kernel(
        _SIMT,
        "gemm",
        T=dtype,
        W=DType.int8 if isinstance(format, Scheme) else format,
        SCALE=scales or DType.float16,
        OUT=out_dtype,
        LOAD=load,
        TILE_M=tile,
        TILE_N=tile,
        EPILOGUE=epilogue,
        BIAS=has_bias,
    )
    return _Plan(kernel, tiles(tile), 256, 0)


def _row(weight: LinearWeight) -> int:
    """Elements from one row of the weights to the next."""
    itemsize = 1 if isinstance(weight.format, Scheme) else weight.format.itemsize
    return row_bytes(weight.format, weight.in_features) // itemsize
