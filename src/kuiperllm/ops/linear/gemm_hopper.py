"""Launches the matrix product for Hopper, `gemm_wgmma.cu`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from kuiperllm.backends.cuda.launch import Kernel, chip, launch, tensor_map
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.linear.cuda_weights import row_bytes
from kuiperllm.ops.linear.gemm_tiling import MAX_COUNTERS, SPLIT_EVENLY, SWIGLU, Tiling, all_tilings, choose
from kuiperllm.ops.linear.weight import LinearWeight

_SOURCE = Path(__file__).with_name("gemm_wgmma.cu")
_STEP = 64
_ALIGNMENT = 16  # of what the copy engine moves


def can_take(x: Tensor, weight: LinearWeight, epilogue: int) -> bool:
    """Whether the copy engine can read the operands, and the tensor cores multiply them."""
    if weight.format != x.dtype.name or x.dtype is DType.float32 or not chip(x.device).is_hopper:
        return False
    if epilogue == SWIGLU and weight.out_features % 16:
        return False
    return _is_aligned(x)


def _is_aligned(x: Tensor) -> bool:
    return x.address % _ALIGNMENT == 0 and (x.shape[0] == 1 or x.strides[0] * x.itemsize % _ALIGNMENT == 0)


class _Plan(NamedTuple):
    """Everything about a launch that follows from shapes and types."""

    kernel: Kernel
    tiling: Tiling
    blocks: int
    shared: int
    tiles: tuple[int, int]


def gemm(x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, tiling: Tiling | None = None) -> None:
    """The product of operands that `can_take` accepts; see `gemm.gemm`.

    Args:
        x: [M, K].
        weight: [N, K].
        out: [M, N], or [M, N / 2] if gated; any alignment.
        epilogue: PLAIN, ACCUMULATE or SWIGLU.
        tiling: how to cut it up (default: the best that is known).
    """
    (m, k), n = x.shape, weight.out_features
    direct = out.dtype is not x.dtype or not _is_aligned(out)
    plan = _plan(
        m, n, k, x.dtype, out.dtype, epilogue, direct, weight.bias is not None, tiling,
        chip(x.device).multiprocessors,
    )  # fmt: skip
    maps = _maps(x, weight, out, epilogue, plan.tiling, direct)
    workspace, counters = _workspace(x.device) if plan.tiling.split == SPLIT_EVENLY else (None, None)
    launch(
        plan.kernel, plan.blocks, 128 * (plan.tiling.groups + 1),
        *maps, weight.bias, out, out.strides[0], m, out.shape[1],
        -(-k // _STEP), *plan.tiles, plan.tiling.raster, workspace, counters,
        shared=plan.shared, cluster=plan.tiling.cluster,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _plan(
    m: int,
    n: int,
    k: int,
    dtype: DType,
    out_dtype: DType,
    epilogue: int,
    direct: bool,
    has_bias: bool,
    tiling: Tiling | None,
    multiprocessors: int,
) -> _Plan:
    if tiling is None:
        tiling = choose(m, n, k, epilogue, direct, multiprocessors)
    return _Plan(
        kernel(tiling, dtype, out_dtype, epilogue, direct, has_bias),
        tiling,
        tiling.clusters(m, n, k, multiprocessors) * tiling.cluster,
        tiling.shared_bytes(direct),
        tiling.tiles(m, n),
    )


def kernel(
    tiling: Tiling, dtype: DType, out_dtype: DType, epilogue: int, direct: bool, has_bias: bool
) -> Kernel:
    """The kernel of a tiling."""
    return Kernel(
        _SOURCE,
        "gemm",
        T=dtype,
        OUT=out_dtype,
        TILE_P=tiling.tile_p,
        TILE_Q=tiling.tile_q,
        STAGES=tiling.stages(direct),
        CLUSTER=tiling.cluster,
        SHARE_P=tiling.share_p,
        SWAP=tiling.swap,
        SPLIT=tiling.split,
        RESIDENT=tiling.resident,
        STREAM=tiling.stream,
        EPILOGUE=epilogue,
        BIAS=has_bias,
        DIRECT=direct,
    )


def _maps(
    x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, tiling: Tiling, direct: bool
) -> tuple[bytes, bytes, bytes]:
    """How the copy engine sees P, Q and the result."""
    (m, k), n = x.shape, weight.out_features
    element, itemsize = x.dtype.name, x.itemsize
    rows_p, rows_q = tiling.rows
    rows_w, rows_x = (rows_p, rows_q) if tiling.swap else (rows_q, rows_p)
    row = row_bytes(weight.format, k)
    x_row = x.strides[0] * itemsize if m > 1 else row
    map_x = tensor_map(x, element, (k, m), (x_row,), (_STEP, rows_x), 128)
    if epilogue == SWIGLU:  # tiles of 8 gate rows, 8 up rows, 8 gate rows, ...
        half = n // 2
        sizes, strides = (k, 8, 2, half // 8), (row, row * half, row * 8)
        map_w = tensor_map(weight.data, element, sizes, strides, (_STEP, 8, 2, rows_w // 16), 128)
    else:
        map_w = tensor_map(weight.data, element, (k, n), (row,), (_STEP, rows_w), 128)
    map_p, map_q = (map_w, map_x) if tiling.swap else (map_x, map_w)
    if direct:
        return map_p, map_q, map_x  # the third is not looked at
    box = (32 if epilogue == SWIGLU else 64, tiling.chunk) if tiling.swap else (tiling.chunk, 64)
    width = out.shape[1]
    out_row = out.strides[0] * itemsize if m > 1 else -(-width * itemsize // _ALIGNMENT) * _ALIGNMENT
    return map_p, map_q, tensor_map(out, element, (width, m), (out_row,), box, box[0] * itemsize)


@lru_cache(maxsize=16)
def _workspace(device: Device) -> tuple[Tensor, Tensor]:
    """Memory for sums of parts of tiles, and counters that are zero between kernels; one for each device.

    Made by another thread: what a thread allocates and fills while it records a graph belongs to the graph.
    """

    def make() -> tuple[Tensor, Tensor]:
        tile = max(t.tile_p * t.tile_q * t.resident for t in all_tilings() if t.split == SPLIT_EVENLY)
        sums = Tensor.empty((2 * chip(device).multiprocessors * tile,), DType.float32, device)
        return sums, Tensor.zeros((MAX_COUNTERS,), DType.int32, device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
