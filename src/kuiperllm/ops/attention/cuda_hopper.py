"""Launches the attention kernel for Hopper: tiles by the bulk copy engine, products by warpgroups."""

from __future__ import annotations

from functools import cache as remembered
from pathlib import Path
from typing import TYPE_CHECKING

from kuiperllm.backends.cuda.launch import Kernel, chip, launch, tensor_map
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.attention.cache import LayerCache

if TYPE_CHECKING:
    from kuiperllm.ops.attention import Batch

_SOURCE = Path(__file__).with_name("prefill_wgmma.cu")
_QUERIES = 128  # tokens of a block
_KEYS = 128  # tokens of a tile
_COLUMNS = 64  # elements of a swizzled row
_STAGES = {64: 5, 128: 3}  # tiles under way, by head_dim: as many as shared memory holds


def can_take(q: Tensor, cache: LayerCache) -> bool:
    """Whether the chip, the types and the shapes are ones that the kernel is for."""
    block = cache.block_size
    return (
        chip(q.device).is_hopper
        and q.dtype.itemsize == 2
        and cache.keys.dtype is q.dtype
        and cache.head_dim in _STAGES
        and (_KEYS % block == 0 or block % _KEYS == 0)
    )


def prefill(
    q: Tensor, cache: LayerCache, batch: Batch, scale: float, out: Tensor, *, skip_single: bool
) -> None:
    """Attention of the tokens of sequences; rows of q and out [T, H, d] aligned to 16 bytes.

    Args:
        q: [T, H, d].
        cache: K heads of d.
        batch: the sequences.
        scale: of the scores, positive.
        out: [T, H, d].
        skip_single: leave out sequences with one new token.
    """
    tokens, heads, head_dim = q.shape
    token_stride, head_stride = (
        (s if n > 1 else head_dim) * q.itemsize for s, n in zip(q.strides, q.shape[:2], strict=False)
    )
    queries = tensor_map(
        q, str(q.dtype), (head_dim, heads, tokens), (head_stride, token_stride), (_COLUMNS, 1, _QUERIES), 128
    )
    rows = cache.num_blocks * cache.num_kv_heads * cache.block_size
    box = _COLUMNS, min(cache.block_size, _KEYS)
    keys, values = (
        tensor_map(x, str(x.dtype), (head_dim, rows), (head_dim * x.itemsize,), box, 128)
        for x in (cache.keys, cache.values)
    )
    tile_bytes = _QUERIES * head_dim * q.itemsize
    stages = _STAGES[head_dim]
    launch(
        _kernel(q.dtype, head_dim, cache.block_size, stages),
        (heads, -(-batch.max_query_len // _QUERIES), batch.seq_lens.shape[0]), 384,
        queries, keys, values, batch.block_table, batch.query_start_loc, batch.seq_lens, out,
        cache.num_kv_heads, int(skip_single), rows, *out.strides[:2], batch.block_table.strides[0], scale,
        shared=1024 + (1 + 2 * stages) * tile_bytes + 8 * (1 + 4 * stages),
    )  # fmt: skip


@remembered
def _kernel(dtype: DType, head_dim: int, block_size: int, stages: int) -> Kernel:
    return Kernel(_SOURCE, "prefill_wgmma", T=dtype, D=head_dim, BLOCK=block_size, STAGES=stages)
