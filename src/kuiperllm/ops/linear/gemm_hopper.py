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
    if weight.format is not x.dtype or x.dtype is DType.float32 or not chip(x.device).is_hopper:
        return False
    if epilogue == SWIGLU and weight.out_features % 16:
        return False
    return is_aligned(x)


def is_aligned(x: Tensor) -> bool:
    """Whether the copy engine can read or write a matrix."""
    return x.address % _ALIGNMENT == 0 and (x.shape[0] == 1 or x.strides[0] * x.itemsize % _ALIGNMENT == 0)


class _Plan(NamedTuple):
    """Everything about a launch that follows from shapes and types."""

    kernel: Kernel
    tiling: Tiling
    blocks: int
    threads: int
    shared: int
    work: tuple[int, int, int, int]
    """Steps through K, tiles along P and Q, raster."""
    rows: tuple[int, int]
    """Rows of X and of W that a block copies at a time."""
    chunk: tuple[int, int]
    """Columns and rows of the result that leave at a time."""


def gemm(
    x: Tensor,
    weight: LinearWeight,
    out: Tensor,
    epilogue: int,
    tiling: Tiling | None = None,
    *,
    constant: bool = True,
) -> None:
    """The product of operands that `can_take` accepts; see `gemm.gemm`.

    Args:
        x: [M, K].
        weight: [N, K].
        out: [M, N], or [M, N / 2] if gated; any alignment.
        epilogue: PLAIN, ACCUMULATE or SWIGLU.
        tiling: how to cut it up (default: the best that is known).
        constant: whether the weights may be read before the kernel in front has ended.
    """
    (m, k), n = x.shape, weight.out_features
    direct = out.dtype is not x.dtype or not is_aligned(out)
    plan = _plan(
        m, n, k, x.dtype, out.dtype, epilogue, direct, weight.bias is not None, constant, tiling,
        chip(x.device).multiprocessors,
    )  # fmt: skip
    sums, counters = workspace(x.device) if plan.tiling.split == SPLIT_EVENLY else (None, None)
    launch(
        plan.kernel, plan.blocks, plan.threads, *_maps(x, weight, out, epilogue, plan, direct),
        weight.bias, out, out.strides[0], m, out.shape[1], *plan.work, sums, counters,
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
    constant: bool,
    tiling: Tiling | None,
    multiprocessors: int,
) -> _Plan:
    if tiling is None:
        tiling = choose(m, n, k, epilogue, direct, multiprocessors)
    of_p, of_q = tiling.rows
    chunk = (32 if epilogue == SWIGLU else 64, tiling.chunk) if tiling.swap else (tiling.chunk, 64)
    return _Plan(
        kernel=kernel(tiling, dtype, out_dtype, epilogue, direct, has_bias, constant),
        tiling=tiling,
        blocks=tiling.clusters(m, n, k, multiprocessors) * tiling.cluster,
        threads=128 * (tiling.groups + 1),
        shared=tiling.shared_bytes(direct),
        work=(-(-k // _STEP), *tiling.tiles(m, n), tiling.raster),
        rows=(of_q, of_p) if tiling.swap else (of_p, of_q),
        chunk=chunk,
    )


def kernel(
    tiling: Tiling,
    dtype: DType,
    out_dtype: DType,
    epilogue: int,
    direct: bool,
    has_bias: bool,
    constant: bool = True,
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
        EARLY=constant,
    )


def _maps(
    x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, plan: _Plan, direct: bool
) -> tuple[bytes, bytes, bytes]:
    """How the copy engine sees P, Q and the result."""
    (m, k), n, width = x.shape, weight.out_features, out.shape[1]
    element = str(x.dtype)
    of_x, of_w = plan.rows
    row = row_bytes(x.dtype, k)
    map_x = tensor_map(x, element, (k, m), (_row_bytes(x, row),), (_STEP, of_x), 128)
    if epilogue == SWIGLU:  # tiles of 8 gate rows, 8 up rows, 8 gate rows, ...
        sizes, strides = (k, 8, 2, width // 8), (row, row * width, row * 8)
        map_w = tensor_map(weight.data, element, sizes, strides, (_STEP, 8, 2, of_w // 16), 128)
    else:
        map_w = tensor_map(weight.data, element, (k, n), (row,), (_STEP, of_w), 128)
    map_p, map_q = (map_w, map_x) if plan.tiling.swap else (map_x, map_w)
    if direct:
        return map_p, map_q, map_x  # the third is not looked at
    out_row = _row_bytes(out, row_bytes(x.dtype, width))
    map_out = tensor_map(out, element, (width, m), (out_row,), plan.chunk, plan.chunk[0] * 2)
    return map_p, map_q, map_out


def _row_bytes(matrix: Tensor, of_one: int) -> int:
    """Bytes from a row of 16-bit elements to the next; a single row, of any stride, gets `of_one`."""
    return matrix.strides[0] * 2 if matrix.shape[0] > 1 else of_one


@lru_cache(maxsize=16)
def workspace(device: Device) -> tuple[Tensor, Tensor]:
    """Memory for sums of parts of tiles, and counters that are zero between kernels; one for each device.

    Made by another thread: what a thread allocates and fills while it records a graph belongs to the graph.
    """

    def make() -> tuple[Tensor, Tensor]:
        tile = max(t.tile_p * t.tile_q * t.resident for t in all_tilings() if t.split == SPLIT_EVENLY)
        sums = Tensor.empty((2 * chip(device).multiprocessors * tile,), DType.float32, device)
        return sums, Tensor.zeros((MAX_COUNTERS,), DType.int32, device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
