"""Launches matrix products for many rows of x on CUDA: the kernel that fits chip, types and alignment."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from kuiperllm.backends.cuda.launch import Kernel, chip, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear import gemm_codes, gemm_hopper
from kuiperllm.ops.linear.cuda_weights import row_bytes
from kuiperllm.ops.linear.expand import gemm_expanded
from kuiperllm.ops.linear.gemm_tiling import ACCUMULATE, PLAIN, SWIGLU
from kuiperllm.ops.linear.planes import in_stored_order, second_plane, template
from kuiperllm.ops.linear.weight import LinearWeight, WeightFormat
from kuiperllm.quant import Scheme

_MMA = Path(__file__).with_name("gemm_mma.cu")
_SIMT = Path(__file__).with_name("gemm_simt.cu")
_RASTER = 8
_STEP = 64
"""Columns of K that the kernels multiply at a time."""


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
    x = in_stored_order(x, weight)
    if not is_for_tensor_cores(x):
        gemm_simt(x, weight, out, epilogue)
    elif gemm_hopper.can_take(x, weight, epilogue):
        gemm_hopper.gemm(x, weight, out, epilogue)
    elif gemm_codes.can_take(x, weight, epilogue):
        tiling = gemm_codes.best_tiling(x, weight, out, epilogue)
        if tiling is None:
            gemm_expanded(x, weight, out, epilogue, gemm_16_bits)
        else:
            gemm_codes.gemm(x, weight, out, epilogue, tiling)
    elif weight.format is x.dtype or has_whole_steps(weight):
        gemm_mma(x, weight, out, epilogue)
    elif weight.scheme is not None:
        gemm_expanded(x, weight, out, epilogue, gemm_16_bits)
    else:
        gemm_simt(x, weight, out, epilogue)


def gemm_16_bits(x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int) -> None:
    """The product with weights of x's type, 16 bits, that the kernel in front may have written."""
    if gemm_hopper.can_take(x, weight, epilogue):
        gemm_hopper.gemm(x, weight, out, epilogue, constant=False)
    else:
        gemm_mma(x, weight, out, epilogue, constant=False)


def is_for_tensor_cores(x: Tensor) -> bool:
    """Whether kernels that multiply on tensor cores can read x."""
    aligned = x.address % 16 == 0 and (x.shape[0] == 1 or x.strides[0] % 8 == 0)
    return x.dtype is not DType.float32 and x.shape[1] % 8 == 0 and aligned


def has_whole_steps(weight: LinearWeight) -> bool:
    """Whether each piece of K that kernels multiply at a time has whole groups, or is part of one."""
    group = weight.group_size
    return group > 0 and (_STEP % group == 0 or group % _STEP == 0)


# --- tensor cores -----------------------------------------------------------------------------------------


class MmaTile(NamedTuple):
    """A configuration of `gemm_mma.cu`."""

    m: int
    n: int
    warps: tuple[int, int, int]
    """Along M, N and K."""
    stages: int

    def shared_bytes(self, format: WeightFormat) -> int:
        """Shared memory of a block."""
        of_row = 128
        if isinstance(format, Scheme):
            groups = max(1, _STEP // format.group_size)
            of_row = _STEP * format.bits // 8 + groups * (8 if format.has_zeros else 4)
        return self.stages * (self.m * 128 + self.n * of_row)


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
    x: Tensor,
    weight: LinearWeight,
    out: Tensor,
    epilogue: int,
    tile: MmaTile | None = None,
    *,
    constant: bool = True,
) -> None:
    """The product on tensor cores: x in 16 bits, K % 8 == 0; weights likewise, or see `has_whole_steps`."""
    plan = _mma_plan(
        x.shape[0], weight.out_features, x.dtype, weight.format, out.dtype, epilogue,
        weight.bias is not None, constant, tile, chip(x.device).multiprocessors,
    )  # fmt: skip
    launch(
        plan.kernel, plan.tiles[0] * plan.tiles[1], plan.threads,
        x, weight.data, second_plane(weight), weight.scales, weight.super_scales, weight.bias, out,
        x.shape[0], out.shape[1], x.shape[1], x.strides[0], _row(weight), out.strides[0],
        *plan.tiles, _RASTER, shared=plan.shared,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _mma_plan(
    m: int,
    n: int,
    dtype: DType,
    format: WeightFormat,
    out_dtype: DType,
    epilogue: int,
    has_bias: bool,
    constant: bool,
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
        GROUP=format.group_size if isinstance(format, Scheme) else 0,
        TILE_M=tile.m,
        TILE_N=tile.n,
        WARPS_M=warps_m,
        WARPS_N=warps_n,
        WARPS_K=warps_k,
        STAGES=tile.stages,
        EPILOGUE=epilogue,
        BIAS=has_bias,
        EARLY=constant,
        **template(format),
    )
    return _Plan(kernel, tiles(tile), 32 * warps_m * warps_n * warps_k, tile.shared_bytes(format))


# --- any operands -----------------------------------------------------------------------------------------

SIMT_TILES = (128, 64)
"""Sides of the tiles of `gemm_simt.cu`."""


def gemm_simt(x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, tile: int | None = None) -> None:
    """The product with exact float32 products, of operands of any type and alignment."""
    k, vector = x.shape[1], 4 * x.itemsize
    load = 1 if k % 4 or x.address % vector or (x.shape[0] > 1 and x.strides[0] % 4) else 4
    plan = _simt_plan(
        x.shape[0], weight.out_features, x.dtype, weight.format, out.dtype, epilogue,
        weight.bias is not None, load, tile, chip(x.device).multiprocessors,
    )  # fmt: skip
    launch(
        plan.kernel, plan.tiles[0] * plan.tiles[1], plan.threads,
        x, weight.data, weight.scales, weight.super_scales, weight.bias, out,
        x.shape[0], out.shape[1], k, x.strides[0], _row(weight), out.strides[0], weight.group_size,
        *plan.tiles, _RASTER,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _simt_plan(
    m: int,
    n: int,
    dtype: DType,
    format: WeightFormat,
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
        W=dtype if isinstance(format, Scheme) else format,
        OUT=out_dtype,
        LOAD=load,
        TILE_M=tile,
        TILE_N=tile,
        EPILOGUE=epilogue,
        BIAS=has_bias,
        **template(format),
    )
    return _Plan(kernel, tiles(tile), 256, 0)


def _row(weight: LinearWeight) -> int:
    """Elements from one row of floating-point weights to the next."""
    if isinstance(weight.format, Scheme):
        return 0
    return row_bytes(weight.format, weight.in_features) // weight.format.itemsize
