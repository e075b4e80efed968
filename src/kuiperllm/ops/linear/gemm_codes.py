"""Launches the matrix product for Hopper with quantized weights, `gemm_codes.cu`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from kuiperllm.backends.cuda.launch import Kernel, chip, launch, tensor_map
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.codes_tiling import choose, shared_bytes, stages, step_columns
from kuiperllm.ops.linear.gemm_hopper import is_aligned, workspace
from kuiperllm.ops.linear.gemm_tiling import SPLIT_EVENLY, SWIGLU, Tiling
from kuiperllm.ops.linear.planes import plane_bits, second_plane, template
from kuiperllm.ops.linear.weight import LinearWeight
from kuiperllm.quant import Scheme

_SOURCE = Path(__file__).with_name("gemm_codes.cu")
_PART = 64  # columns of x that the copy engine moves at a time
_LEAST_COPY = 16  # bytes; also what it aligns rows to


def can_take(x: Tensor, weight: LinearWeight, epilogue: int) -> bool:
    """Whether the copy engine can read the operands, and the kernel has instructions for the scheme."""
    scheme, k = weight.scheme, weight.in_features
    if scheme is None or x.dtype is DType.float32 or not chip(x.device).is_hopper or not is_aligned(x):
        return False
    if (_PART % scheme.group_size and scheme.group_size % _PART) or k % _PART:
        return False
    if epilogue == SWIGLU and weight.out_features % 16:
        return False
    return all(k * bits // 8 % _LEAST_COPY == 0 for bits in plane_bits(scheme))


class _Plan(NamedTuple):
    """Everything about a launch that follows from shapes and types."""

    kernel: Kernel
    tiling: Tiling
    blocks: int
    threads: int
    shared: int
    step: int
    work: tuple[int, int, int]
    """Tiles along W and along x, raster."""
    rows: tuple[int, int]
    """Rows of W and of x that a block copies at a time."""
    chunk: tuple[int, int]
    """Columns and rows of the result that leave at a time."""


def best_tiling(x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int) -> Tiling | None:
    """How to cut up a product of operands that `can_take` accepts; None: better expand the weights."""
    assert isinstance(weight.format, Scheme)
    direct = out.dtype is not x.dtype or not is_aligned(out)
    multiprocessors = chip(x.device).multiprocessors
    m, k = x.shape
    return choose(m, weight.out_features, k, weight.format, epilogue, direct, multiprocessors)


def gemm(x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, tiling: Tiling) -> None:
    """The product of operands that `can_take` accepts; see `gemm.gemm`.

    Args:
        x: [M, K].
        weight: [N, K].
        out: [M, N], or [M, N / 2] if gated; any alignment.
        epilogue: PLAIN, ACCUMULATE or SWIGLU.
        tiling: how to cut it up; see `best_tiling`.
    """
    assert isinstance(weight.format, Scheme)
    (m, k), n = x.shape, weight.out_features
    direct = out.dtype is not x.dtype or not is_aligned(out)
    plan = _plan(
        m, n, k, x.dtype, weight.format, out.dtype, epilogue, direct, weight.bias is not None, tiling,
        chip(x.device).multiprocessors,
    )  # fmt: skip
    sums, counters = workspace(x.device) if plan.tiling.split == SPLIT_EVENLY else (None, None)
    launch(
        plan.kernel, plan.blocks, plan.threads, *_maps(x, weight, out, epilogue, plan, direct),
        weight.scales, weight.super_scales, weight.bias, out, out.strides[0], m, out.shape[1], k,
        *plan.work, sums, counters, shared=plan.shared, cluster=plan.tiling.cluster,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _plan(
    m: int,
    n: int,
    k: int,
    dtype: DType,
    scheme: Scheme,
    out_dtype: DType,
    epilogue: int,
    direct: bool,
    has_bias: bool,
    tiling: Tiling,
    multiprocessors: int,
) -> _Plan:
    step = step_columns(tiling, k)
    return _Plan(
        kernel=kernel(tiling, scheme, step, dtype, out_dtype, epilogue, direct, has_bias),
        tiling=tiling,
        blocks=tiling.clusters(m, n, k, multiprocessors, step) * tiling.cluster,
        threads=128 * (tiling.groups + 1),
        shared=shared_bytes(tiling, scheme, step, direct),
        step=step,
        work=(*tiling.tiles(m, n), tiling.raster),
        rows=tiling.rows,
        chunk=(32 if epilogue == SWIGLU else 64, tiling.chunk),
    )


def kernel(
    tiling: Tiling,
    scheme: Scheme,
    step: int,
    dtype: DType,
    out_dtype: DType,
    epilogue: int,
    direct: bool,
    has_bias: bool,
) -> Kernel:
    """The kernel of a tiling for weights of a scheme, `step` columns at a time."""
    return Kernel(
        _SOURCE,
        "gemm",
        T=dtype,
        OUT=out_dtype,
        TILE_P=tiling.tile_p,
        TILE_Q=tiling.tile_q,
        STEP=step,
        STAGES=stages(tiling, scheme, step, direct),
        CLUSTER=tiling.cluster,
        SHARE_P=False,
        SWAP=True,
        SPLIT=tiling.split,
        RESIDENT=tiling.resident,
        STREAM=tiling.stream,
        EPILOGUE=epilogue,
        BIAS=has_bias,
        DIRECT=direct,
        GROUP=scheme.group_size,
        **template(scheme),
    )


def _maps(
    x: Tensor, weight: LinearWeight, out: Tensor, epilogue: int, plan: _Plan, direct: bool
) -> tuple[bytes, bytes, bytes, bytes]:
    """How the copy engine sees both planes of W, x and the result; something else where there is none."""
    assert weight.scheme is not None
    (m, k), width = x.shape, out.shape[1]
    low, high = plane_bits(weight.scheme)
    map_low = map_high = _plane_map(weight.data, weight, low, epilogue, plan)
    if (second := second_plane(weight)) is not None:
        map_high = _plane_map(second, weight, high, epilogue, plan)
    element = str(x.dtype)
    map_x = tensor_map(x, element, (k, m), (_row_bytes(x),), (_PART, plan.rows[1]), 128)
    if direct:
        return map_low, map_high, map_x, map_x
    map_out = tensor_map(out, element, (width, m), (_row_bytes(out),), plan.chunk, plan.chunk[0] * 2)
    return map_low, map_high, map_x, map_out


def _plane_map(plane: Tensor, weight: LinearWeight, bits: int, epilogue: int, plan: _Plan) -> bytes:
    row, rows = weight.in_features * bits // 8, plan.rows[0]
    box = max(plan.step * bits // 8, _LEAST_COPY)
    swizzle = box if box > _LEAST_COPY else 0
    if epilogue == SWIGLU:  # tiles of 8 gate rows, 8 up rows, 8 gate rows, ...
        width = weight.out_features // 2
        sizes, strides = (row, 8, 2, width // 8), (row, row * width, row * 8)
        return tensor_map(plane, "uint8", sizes, strides, (box, 8, 2, rows // 16), swizzle)
    return tensor_map(plane, "uint8", (row, weight.out_features), (row,), (box, rows), swizzle)


def _row_bytes(matrix: Tensor) -> int:
    """Bytes from a row of 16-bit elements to the next; a single row may have any stride."""
    return (matrix.strides[0] if matrix.shape[0] > 1 else -(-matrix.shape[1] // 8) * 8) * 2
