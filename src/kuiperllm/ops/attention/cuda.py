"""Launches the CUDA kernels of `attention`.

Single tokens go through `cuda_decode.py`. Several tokens of a sequence are rows of matrices for the tensor
cores; float32 and caches of another type than the activations are not, and take the kernel for single tokens.
"""

from __future__ import annotations

from functools import cache as remembered
from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, chip, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops.attention import Batch, cuda_hopper
from kuiperllm.ops.attention.cache import LayerCache
from kuiperllm.ops.attention.cuda_decode import decode_mma, decode_scalar, merge_parts, parts_for
from kuiperllm.ops.attention.cuda_layout import (
    decodes_on_tensor_cores,
    is_aligned,
    lanes,
    takes_tensor_cores,
)
from kuiperllm.ops.contract import ACTIVATIONS

DTYPES = ACTIVATIONS

USE_HOPPER = True
"""Whether Hopper's own kernel is taken where it can be; without, the one for all chips."""

_FOLDER = Path(__file__).parent
_PREFILL_WARPS = 4


def cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Keys and values are both [blocks, K, block_size, d].

    Raises:
        ShapeError: `block_size` is not a multiple of 16, or `head_dim` is odd.
    """
    if block_size < 16 or block_size % 16:
        raise ShapeError(f"attention on CUDA needs blocks of a multiple of 16 tokens, not {block_size}")
    if head_dim % 2:
        raise ShapeError(f"attention on CUDA needs heads of an even number of elements, not {head_dim}")
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return shape, shape


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """A few lanes for each token and head."""
    k, v = (x if is_aligned(x) else x.contiguous() for x in (k, v))
    tokens, heads, head_dim = k.shape
    blocks = -(-tokens * heads * lanes(head_dim, k.dtype, cache.keys.dtype) // 128)
    launch(
        _write_kv(k.dtype, cache.keys.dtype, head_dim, cache.block_size), blocks, 128,
        k, v, slot_mapping, cache.keys, cache.values, tokens, heads, *k.strides[:2], *v.strides[:2],
    )  # fmt: skip


def attention(q: Tensor, cache: LayerCache, batch: Batch, scale: float, out: Tensor) -> None:
    """Kernels by the kinds of sequences in the batch."""
    if not q.numel or not batch.seq_lens.numel:
        return
    if not is_aligned(q):
        q = q.contiguous()
    if not is_aligned(out):
        aligned = Tensor.empty(out.shape, out.dtype, out.device)
        attention(q, cache, batch, scale, aligned)
        out.copy_(aligned)
    elif batch.max_query_len == 1:
        _decode(q, cache, batch, scale, out)
    elif not takes_tensor_cores(q.dtype, cache):
        decode_scalar(q, cache, batch, scale, out[:, None])
    elif (parts := batch.split()) is not None:
        single, others = parts
        _decode(q[: batch.num_single], cache, single, scale, out[: batch.num_single])
        attention(q, cache, others, scale, out)
    else:
        sequences = batch.seq_lens.shape[0]
        run = cuda_hopper.prefill if USE_HOPPER and cuda_hopper.can_take(q, cache) else _prefill
        apart = sequences > 1 and decodes_on_tensor_cores(q.dtype, cache)
        run(q, cache, batch, scale, out, skip_single=apart)
        if apart:
            decode_mma(q, cache, batch, scale, out[:, None])


def _decode(q: Tensor, cache: LayerCache, batch: Batch, scale: float, out: Tensor) -> None:
    sequences, table_width = batch.block_table.shape
    tokens, heads, head_dim = q.shape
    run = decode_mma if decodes_on_tensor_cores(q.dtype, cache) else decode_scalar
    blocks = sequences * cache.num_kv_heads
    parts = parts_for(chip(q.device).multiprocessors, blocks, table_width * cache.block_size)
    if parts == 1 or tokens != sequences:
        run(q, cache, batch, scale, out[:, None])
        return
    partial = Tensor.empty((tokens, parts, heads, head_dim), q.dtype, q.device)
    stats = Tensor.empty((tokens, parts, heads, 2), DType.float32, q.device)
    run(q, cache, batch, scale, partial, stats)
    merge_parts(partial, stats, out)


def _prefill(
    q: Tensor, cache: LayerCache, batch: Batch, scale: float, out: Tensor, *, skip_single: bool
) -> None:
    heads, head_dim = q.shape[1:]
    group = heads // cache.num_kv_heads
    row_bytes = (-(-head_dim // 16) * 16 + 8) * q.itemsize
    keys = 32 if head_dim > 128 or (head_dim > 64 and chip(q.device).max_shared_bytes < 128 << 10) else 64
    tiles = -(-batch.max_query_len * group // (16 * _PREFILL_WARPS))
    launch(
        _prefill_mma(q.dtype, head_dim, cache.block_size, group, keys),
        (tiles, cache.num_kv_heads, batch.seq_lens.shape[0]), _PREFILL_WARPS * 32,
        q, cache.keys, cache.values, batch.block_table, batch.query_start_loc, batch.seq_lens, out,
        cache.num_kv_heads, int(skip_single), *q.strides[:2], *out.strides[:2], batch.block_table.strides[0],
        scale, shared=2 * 2 * keys * row_bytes,
    )  # fmt: skip


@remembered
def _write_kv(dtype: DType, cache_dtype: DType, head_dim: int, block_size: int) -> Kernel:
    return Kernel(_FOLDER / "write_kv.cu", "write_kv", T=dtype, C=cache_dtype, D=head_dim, BLOCK=block_size)


@remembered
def _prefill_mma(dtype: DType, head_dim: int, block_size: int, group: int, keys: int) -> Kernel:
    return Kernel(
        _FOLDER / "prefill_mma.cu", "prefill_mma", T=dtype, D=head_dim, BLOCK=block_size, GROUP=group,
        WARPS=_PREFILL_WARPS, KEYS=keys,
    )  # fmt: skip
