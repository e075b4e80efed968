"""Products with few rows of x on CUDA, limited by how fast the matrix can be read."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, chip, launch
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.linear.cuda_weights import row_bytes
from kuiperllm.ops.linear.gemv_plan import plan
from kuiperllm.ops.linear.gemv_problem import MAX_GEMV_ROWS, THREADS, Plan, Problem
from kuiperllm.ops.linear.planes import in_stored_order, second_plane, template
from kuiperllm.ops.linear.weight import LinearWeight, WeightFormat
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.quant import Scheme

__all__ = ["gemv", "gemv_merge", "suits_gemv"]

_ALIGNMENT = 16
_ANY_SOURCE = Path(__file__).with_name("gemv_any.cu")
_MERGE_SOURCE = Path(__file__).with_name("merge_splits.cu")
_ANY_WARPS = 8
_MOST_ROWS_OF_16_BITS = 4


def suits_gemv(rows: int, weight: LinearWeight) -> bool:
    """Whether a product with so many rows of x is faster as a GEMV than as a GEMM.

    Both read the matrix once. A GEMM has codes to expand, which takes longer than eight rows do; of 16 bits
    it is the faster one from five rows on.
    """
    has_16_bits = weight.scheme is None and weight.format in (DType.bfloat16, DType.float16)
    return rows <= (_MOST_ROWS_OF_16_BITS if has_16_bits else MAX_GEMV_ROWS)


def gemv(
    x: Tensor,
    weight: LinearWeight,
    out: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    accumulate: bool = False,
    swiglu: bool = False,
) -> None:
    """out = x W^T + bias, of x as it is or normalized.

    Args:
        x: [T, K] with T up to `MAX_GEMV_ROWS`, of an activation type.
        weight: [N, K].
        out: [T, N], of x's type or float32.
        norm_weight: float32 [K]: x is `rms_norm(x)` by this weight.
        eps: of the norm.
        accumulate: add to what `out` holds.
        swiglu: out [T, N/2] = silu(first half of the columns) * second half.
    """
    problem = Problem(
        x.shape[0],
        out.shape[1],
        weight.in_features,
        weight.format,
        x.dtype,
        out.dtype,
        weight.bias is not None,
        "PLAIN" if norm_weight is None else "NORM",
        "SWIGLU" if swiglu else "ADD" if accumulate else "STORE",
    )
    if 0 in out.shape:
        return
    if weight.columns is not None and norm_weight is not None:
        x, norm_weight, problem = rms_norm(x, norm_weight, eps), None, problem._replace(prologue="PLAIN")
    _multiply(in_stored_order(x, weight), weight, out, problem, norm_weight, eps)


def _multiply(
    x: Tensor,
    weight: LinearWeight,
    out: Tensor,
    problem: Problem,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Launch the fastest kernel that takes operands like these."""
    found = _plan(x.device, problem) if _is_aligned(x, norm_weight) else None
    if found is not None:
        run(found, problem, x, weight, out, norm_weight=norm_weight, eps=eps)
    elif norm_weight is not None:
        _multiply(rms_norm(x, norm_weight, eps), weight, out, problem._replace(prologue="PLAIN"))
    elif problem.rows > 1 and _plan(x.device, problem._replace(rows=1)) is not None and _is_aligned(x):
        half = problem.rows // 2  # all rows of x together do not fit beside the matrix's
        _multiply(x[:half], weight, out[:half], problem._replace(rows=half))
        _multiply(x[half:], weight, out[half:], problem._replace(rows=problem.rows - half))
    else:
        run_any(problem, x, weight, out)


def gemv_merge(partial: Tensor, stats: Tensor, weight: LinearWeight, residual: Tensor) -> None:
    """Merge what attention found in splits of the context, multiply, and add to the residual stream.

    Args:
        partial: [S, splits, H * d], of an activation type, contiguous: the result of each split, normalized
            by the split's own sum. S is up to `MAX_GEMV_ROWS`, splits up to 16.
        stats: float32 [S, splits, H, 2], contiguous: the largest score as a power of 2, and the sum of
            2^(score - largest); (-1e30, 0) for an empty split, whose result may be anything.
        weight: [D, H * d], the output projection.
        residual: [S, D], of partial's type, is added to.
    """
    rows, splits, width = partial.shape
    heads = stats.shape[2]
    problem = Problem(
        rows,
        residual.shape[1],
        width,
        weight.format,
        partial.dtype,
        residual.dtype,
        weight.bias is not None,
        "MERGE",
        "ADD",
        splits,
        width // heads,
    )
    if 0 in residual.shape:
        return
    found = _plan(partial.device, problem) if weight.columns is None else None
    if found is not None:
        run(found, problem, partial, weight, residual, stats=stats)
        return
    merged = Tensor.empty((rows, width), partial.dtype, partial.device)
    launch(
        _merge_kernel(partial.dtype), (-(-width // THREADS), rows), THREADS,
        partial, stats, merged, splits, heads, width // heads,
    )  # fmt: skip
    gemv(merged, weight, residual, accumulate=True)


def run(
    found: Plan,
    problem: Problem,
    x: Tensor,
    weight: LinearWeight,
    out: Tensor,
    *,
    stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Launch what was planned."""
    if found.method == "digits":
        launch(
            found.kernel, found.grid, THREADS,
            x, stats, norm_weight, eps, weight.data, weight.scales, weight.bias,
            out, problem.outputs, found.share, found.extra, found.launch_after, shared=found.shared,
        )  # fmt: skip
        return
    rows = () if found.method == "vector" else (problem.rows,)
    after = () if found.method == "tensor" else (found.launch_after,)
    matrix: tuple[Tensor | None, ...] = (weight.data,)
    if found.method == "codes":
        matrix = (weight.data, second_plane(weight), weight.scales, weight.super_scales)
    launch(
        found.kernel, found.grid, THREADS,
        x, x.strides[0], *rows, stats, norm_weight, eps, *matrix, weight.bias,
        out, out.strides[0], problem.outputs, found.share, found.extra, *after, shared=found.shared,
    )  # fmt: skip


@cache
def _plan(device: Device, problem: Problem) -> Plan | None:
    return plan(chip(device), problem)


def _is_aligned(x: Tensor, norm_weight: Tensor | None = None) -> bool:
    """Whether vectors of x, and of the norm's weight, can be loaded."""
    if norm_weight is not None and norm_weight.address % _ALIGNMENT:
        return False
    return x.address % _ALIGNMENT == 0 and (x.shape[0] == 1 or x.strides[0] * x.itemsize % _ALIGNMENT == 0)


def run_any(problem: Problem, x: Tensor, weight: LinearWeight, out: Tensor) -> None:
    """Launch the kernel for any size and alignment, with plain loads; x is taken as it is."""
    in_row = 0 if isinstance(problem.format, Scheme) else row_bytes(problem.format, problem.k)
    launch(
        _any_kernel(problem.activation, problem.format, problem.out, problem.epilogue, problem.bias),
        (-(-problem.outputs // _ANY_WARPS), problem.rows), 32 * _ANY_WARPS,
        x, x.strides[0], problem.k, weight.data, in_row, weight.scales, weight.super_scales, weight.bias,
        out, out.strides[0], problem.outputs, weight.out_features,
    )  # fmt: skip


@cache
def _any_kernel(activation: DType, format: WeightFormat, out: DType, epilogue: str, bias: bool) -> Kernel:
    kind, group = (DType.float32, format.group_size) if isinstance(format, Scheme) else (format, 0)
    return Kernel(
        _ANY_SOURCE, "gemv_any",
        T=activation, OUT=out, EPILOGUE=epilogue, HAS_BIAS=bias,
        W=kind, GROUP=group, **template(format),
    )  # fmt: skip


@cache
def _merge_kernel(activation: DType) -> Kernel:
    return Kernel(_MERGE_SOURCE, "merge_splits", T=activation)
