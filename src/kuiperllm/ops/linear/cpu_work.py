"""How the CPU kernels of `linear` share out work, and what they have in common as arguments."""

from __future__ import annotations

from functools import cache

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.cpu_pack import padded_columns
from kuiperllm.ops.linear.weight import LinearWeight

ROUND_MODULE = "kuiperllm.ops.linear.cpu_round_kernel"


def blocks_of(n: int) -> int:
    """Blocks of 16 outputs: the work items of kernels for few rows of x."""
    return (n + 15) // 16


def pairs_of(n: int) -> int:
    """Pairs of blocks: the work items of kernels for many rows of x."""
    return (n + 31) // 32


def grain_of(items: int) -> int:
    """Items claimed at a time: enough for prefetching to pay, few enough that threads end together."""
    return max(1, items // (64 * num_threads()))


def row_grain(k: int) -> int:
    """Rows of k elements claimed at a time."""
    return max(1, 8192 // k)


def bias_of(weight: LinearWeight) -> Tensor:
    """The bias, or any address at all."""
    return weight.data if weight.bias is None else weight.bias


def in_order_of(x: Tensor, weight: LinearWeight) -> Tensor:
    """x with its columns as packed codes have them: in their order, padded with zeros."""
    tokens, width = x.shape
    k = padded_columns(width)
    if weight.scheme is None or (weight.columns is None and k == width):
        return x
    taken = Tensor.empty((tokens, k), DType.float32)
    columns = x if weight.columns is None else weight.columns
    kernel = _take_columns(weight.columns is not None)
    launch(kernel, x, columns, taken, width, k, x.strides[0], items=tokens, grain=row_grain(k))
    return taken


@cache
def _take_columns(ordered: bool) -> Kernel:
    return Kernel(ROUND_MODULE, "take_columns", ORDERED=ordered)
