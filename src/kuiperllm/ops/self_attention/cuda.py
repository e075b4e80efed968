"""Launches the CUDA kernels of `self_attention`.

A decode step of a few sequences is two kernels: one that prepares the new queries and keys, writes the cache
and attends, and the product with the output projection, which puts the parts of the context together in its
prologue. Anything else: one kernel for norms, rotation and the cache, then attention, then the product.
"""

from __future__ import annotations

from functools import cache as remembered
from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, chip, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.attention import Batch, LayerCache, attention
from kuiperllm.ops.attention.cuda_decode import (
    Newest,
    decode_mma,
    decode_scalar,
    merge_parts,
    parts_for,
    tuning_for,
)
from kuiperllm.ops.attention.cuda_layout import decodes_on_tensor_cores, lanes
from kuiperllm.ops.contract import ACTIVATIONS
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.linear.gemv import gemv_merge, suits_gemv

DTYPES = ACTIVATIONS

_ROPE_WRITE = Path(__file__).with_name("rope_write.cu")
_MOST_PARTS = 16  # that the product's prologue puts together; it reads all of them in every block
_FEW_PARTS = 8  # that suffice up to `_MIDDLE_CONTEXT`
_MIDDLE_CONTEXT = 2048
_SHORT_CONTEXT = 512  # of all sequences: up to here latency counts, and a block takes one query head
_LARGE_SHARE = (
    160 << 10
)  # bytes of the product in front for each multiprocessor: if not packed, it leaves no room
_RING_SHARE = 100 << 10  # bytes of the projection for each multiprocessor, that a ring can hold
_LONG_CONTEXT = 16_384  # from here on it pays to have more parts, and a kernel that puts them together


def self_attention(
    qkv: Tensor,
    residual: Tensor,
    cache: LayerCache,
    batch: Batch,
    projection: LinearWeight,
    cos_sin: Tensor,
    scale: float,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    """Two kernels for a decode step, four otherwise."""
    tokens, width = qkv.shape
    if not tokens:
        return
    newest = Newest(cos_sin, q_norm, k_norm, eps)
    is_decode_step = batch.max_query_len == 1 and tokens == batch.seq_lens.shape[0]
    if is_decode_step and suits_gemv(tokens, projection):
        _decode(qkv, residual, cache, batch, projection, newest, scale)
        return
    kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    heads = width // head_dim - 2 * kv_heads
    blocks = -(-tokens * (heads + 2 * kv_heads) * lanes(head_dim, qkv.dtype, cache.keys.dtype) // 128)
    launch(
        _rope_write(qkv.dtype, cache.keys.dtype, head_dim, cache.block_size), blocks, 128,
        qkv, cache.keys, cache.values, batch.positions, batch.slot_mapping, cos_sin, q_norm, k_norm,
        tokens, heads, kv_heads, cos_sin.shape[0], qkv.strides[0], cos_sin.strides[0], eps,
    )  # fmt: skip
    q = Tensor(qkv.buffer, qkv.dtype, (tokens, heads, head_dim), (qkv.strides[0], head_dim, 1), qkv.offset)
    mixed = attention(q, cache, batch, scale)
    linear(mixed.reshape((tokens, heads * head_dim)), projection, out=residual, accumulate=True)


def _decode(
    qkv: Tensor,
    residual: Tensor,
    cache: LayerCache,
    batch: Batch,
    projection: LinearWeight,
    newest: Newest,
    scale: float,
) -> None:
    sequences, width = qkv.shape
    heads = width // cache.head_dim - 2 * cache.num_kv_heads
    capacity = batch.block_table.shape[1] * cache.block_size
    gpu = chip(qkv.device)
    multiprocessors = gpu.multiprocessors
    use_tensor_cores = decodes_on_tensor_cores(qkv.dtype, cache) and sequences * capacity > _SHORT_CONTEXT
    if use_tensor_cores:
        parts = parts_for(multiprocessors, sequences * cache.num_kv_heads, capacity)
        if capacity < _LONG_CONTEXT:
            parts = min(parts, _FEW_PARTS if capacity <= _MIDDLE_CONTEXT else _MOST_PARTS)
    else:
        parts = min(-(-multiprocessors * 9 // 10 // (sequences * heads)), max(1, capacity // 32))
    parts = _power_of_two(parts) if parts <= _MOST_PARTS else parts
    partial = Tensor.empty((sequences, parts, heads, cache.head_dim), qkv.dtype, qkv.device)
    stats = Tensor.empty((sequences, parts, heads, 2), DType.float32, qkv.device)
    if use_tensor_cores:
        before = projection.nbytes // projection.in_features * width  # of the product, about
        is_alone = isinstance(projection.format, DType) and before > _LARGE_SHARE * multiprocessors
        tuning = tuning_for(gpu, cache.head_dim, is_alone=is_alone)
        decode_mma(qkv, cache, batch, scale, partial, stats, newest, tuning)
    else:
        is_short = projection.nbytes <= _RING_SHARE * multiprocessors  # it need not start at once
        decode_scalar(qkv, cache, batch, scale, partial, stats, newest, late=is_short)
    if parts > _MOST_PARTS:
        mixed = Tensor.empty((sequences, heads, cache.head_dim), qkv.dtype, qkv.device)
        merge_parts(partial, stats, mixed)
        linear(mixed.reshape((sequences, -1)), projection, out=residual, accumulate=True)
    else:
        gemv_merge(partial.reshape((sequences, parts, -1)), stats, projection, residual)


def _power_of_two(parts: int) -> int:
    """The next one, at most `_MOST_PARTS`."""
    return min(1 << (parts - 1).bit_length(), _MOST_PARTS)


@remembered
def _rope_write(dtype: DType, cache_dtype: DType, head_dim: int, block_size: int) -> Kernel:
    return Kernel(_ROPE_WRITE, "rope_write", T=dtype, C=cache_dtype, D=head_dim, BLOCK=block_size)
