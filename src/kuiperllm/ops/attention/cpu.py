"""Launches the CPU kernels of `attention`."""

from __future__ import annotations

from functools import cache

from kuiperllm.backends.cpu.features import target
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops.attention import Batch
from kuiperllm.ops.attention.cache import LayerCache

_MODULE = "kuiperllm.ops.attention.cpu_kernel"
_FORMATS = {DType.float32: 0, DType.float16: 1, DType.bfloat16: 2}
_TILE, _SPAN = 24, 4  # as in cpu_kernel.py
_SPLIT_TOKENS = 256  # a sequence is split between threads in pieces of about this many tokens


def cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Keys [blocks, K, d, block_size]: one vector is 16 tokens. Values [blocks, K, block_size, d padded].

    Raises:
        ShapeError: `block_size` is not a multiple of 16.
    """
    if block_size < 16 or block_size % 16:
        raise ShapeError(f"attention on the CPU needs blocks of a multiple of 16 tokens, not {block_size}")
    keys = (num_blocks, num_kv_heads, head_dim, block_size)
    return keys, (num_blocks, num_kv_heads, block_size, _padded(head_dim))


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """One work item for each token and head."""
    tokens, heads, d = k.shape
    scratch = Tensor.empty((num_threads(), _padded(d)), cache.keys.dtype)
    strides = *k.strides[:2], *v.strides[:2]
    launch(
        _write_kv(cache.keys.dtype),
        *(k, v, slot_mapping, cache.keys, cache.values, scratch),
        *(tokens, heads, d, _padded(d), cache.block_size, *strides),
        items=tokens * heads,
        grain=max(cache.block_size, 4096 // d),
    )


def attention(q: Tensor, cache: LayerCache, batch: Batch, scale: float, out: Tensor) -> None:
    """Work items: sequence x key/value head x tile of query rows x piece of the context."""
    if (parts := batch.split()) is not None:
        for part in parts:
            attention(q, cache, part, scale, out)
        return
    heads, d = q.shape[1:]
    sequences, table_width = batch.block_table.shape
    repeats = heads // cache.num_kv_heads
    rows = batch.max_query_len * repeats
    tiles = -(-rows // _TILE)
    items = sequences * cache.num_kv_heads * tiles
    splits = 1
    if batch.max_query_len == 1 and items < 4 * num_threads():
        longest = table_width * cache.block_size
        splits = max(1, min(-(-4 * num_threads() // items), longest // _SPLIT_TOKENS))
    dp = _padded(d)
    scratch = Tensor.empty((num_threads(), _TILE * (d + _SPAN * cache.block_size + dp + 2)))
    partial = Tensor.empty((items * splits, min(rows, _TILE) * (dp + 2))) if splits > 1 else scratch
    shape = (cache.num_kv_heads, repeats, d, dp, cache.block_size, tiles, splits, table_width)
    strides = (*q.strides[:2], *out.strides[:2], scratch.strides[0], partial.strides[0])
    sequence_data: tuple[Tensor, ...] = (batch.block_table, batch.query_start_loc, batch.seq_lens)
    launch(
        _attend(cache.keys.dtype, min(rows, 8), splits > 1, batch.max_query_len == 1),
        *(q, cache.keys, cache.values, *sequence_data, out, scratch, partial),
        *shape,
        *strides,
        scale,
        items=items * splits,
    )
    if splits > 1:
        launch(
            _MERGE,
            *(partial, out, cache.num_kv_heads, repeats, d, dp, splits),
            *out.strides[:2],
            partial.strides[0],
            items=items,
        )


@cache
def _attend(dtype: DType, rows: int, split: bool, fetch: bool) -> Kernel:
    """`rows`: how many query rows there are to share a register tile, at most 8."""
    if target().at_least("avx512"):
        tile = rows if rows <= 7 else 6
        vectors, columns = 2, 4 if tile <= 6 else 3
    else:
        tile, vectors, columns = min(rows, 2), 1, 2
    return Kernel(
        _MODULE,
        "attend",
        FORMAT=_FORMATS[dtype],
        ROWS=tile,
        VECTORS=vectors,
        COLUMNS=columns,
        SPLIT=split,
        FETCH=fetch,
    )


@cache
def _write_kv(dtype: DType) -> Kernel:
    return Kernel(_MODULE, "write_kv", FORMAT=_FORMATS[dtype])


_MERGE = Kernel(_MODULE, "merge_splits")


def _padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16
