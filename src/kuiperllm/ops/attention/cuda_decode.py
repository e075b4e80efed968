"""Launches the CUDA kernels for single tokens: one query row for each head, a long context.

A context is split into parts, which different blocks look at; `merge_parts` puts together what they found.
How many parts there are follows from the capacity of the block table, not from lengths, which the host does
not know when a graph is replayed; a block whose part is empty ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kuiperllm.backends.cuda.driver import Chip
from kuiperllm.backends.cuda.launch import Kernel, chip, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.attention.cache import LayerCache
from kuiperllm.ops.attention.cuda_layout import lanes

if TYPE_CHECKING:
    from kuiperllm.ops.attention import Batch

_FOLDER = Path(__file__).parent
_MOST_PARTS = 64
_PART_TOKENS = 128  # a part is not worth a block below this
_MAX_HEADS = 8  # of a block on tensor cores: columns of a tile
_STEP_ELEMENTS = 128  # of keys, and of values, in one of 8 lanes: more take too many registers
_STAGES = 3  # of about 32 KiB: two blocks have room on a multiprocessor, or one and a block of a product
_MANY_STAGES = 5  # where products leave no room beside them
_LANE_TOKENS = 3  # that a lane has under way; one more where parts are longer


@dataclass(frozen=True, slots=True)
class Newest:
    """What makes queries, keys and values of the newest tokens out of raw ones; see `self_attention`."""

    cos_sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


class Tuning(NamedTuple):
    """How `decode_mma` works; decode_mma.cu has the words."""

    warps: int
    tiles: int
    """8 tokens each of a step: 1, 2 or 4."""
    stages: int
    """Steps that each warp has in shared memory, or on their way there."""

    def shared_bytes(self, head_dim: int) -> int:
        """Of a block: its rings, in which it also merges what its warps have seen."""
        return self.warps * max(self.stages * self.tiles * head_dim * 32, -(-head_dim // 64) * 2048)


def tuning_for(gpu: Chip, head_dim: int, *, is_alone: bool = False) -> Tuning:
    """What is best as a rule.

    Args:
        gpu: which one.
        head_dim: elements of a head.
        is_alone: whether a block has a multiprocessor to itself anyway.
    """
    found = Tuning(8 if head_dim <= 128 else 4, max(1, min(4, _STEP_ELEMENTS // head_dim & -2)), 1)
    room = gpu.max_shared_bytes - _static_bytes(head_dim)
    stages = _MANY_STAGES if is_alone else _STAGES
    return found._replace(stages=max(1, min(stages, room // found.shared_bytes(head_dim))))


def _static_bytes(head_dim: int) -> int:
    """Of shared memory, besides the rings, at most."""
    return 16 * head_dim + 1024


def parts_for(multiprocessors: int, blocks: int, capacity: int) -> int:
    """Into how many parts to split contexts of up to `capacity` tokens.

    One block for each multiprocessor, if that gives several parts of about equal work; else two.
    """
    parts = multiprocessors // blocks
    if parts < 4:
        parts = 2 * multiprocessors // blocks
    return max(1, min(parts, _MOST_PARTS, capacity // _PART_TOKENS))


def decode_mma(
    q: Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
    out: Tensor,
    stats: Tensor | None = None,
    newest: Newest | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Attention of the newest token of each sequence; types as `decodes_on_tensor_cores` says.

    Args:
        q: [T, H, d]; with `newest` raw queries, keys and values [S, (H + 2K) d], whose keys and values are
            also written to the cache.
        cache: K heads of d.
        batch: the sequences. Without `newest`, those with other than one new token are left out.
        scale: of the scores.
        out: [T, parts, H, d].
        stats: float32 [T, parts, H, 2]; None if there is one part.
        newest: how to prepare what q holds.
        tuning: how to work (default: the rule's).
    """
    parts, heads, head_dim = out.shape[1:]
    group = heads // cache.num_kv_heads
    tuning = tuning or tuning_for(chip(q.device), head_dim)
    rows = min(group, _MAX_HEADS)
    kernel = _decode_mma(
        q.dtype, head_dim, cache.block_size, rows, tuning, newest is not None, _ahead(batch, newest),
    )  # fmt: skip
    sequences, table_width = batch.block_table.shape
    capacity = table_width * cache.block_size
    launch(
        kernel, (parts, cache.num_kv_heads * -(-group // rows), sequences), tuning.warps * 32,
        *_operands(q, cache, batch, out, stats, newest), heads, cache.num_kv_heads,
        newest.cos_sin.shape[0] if newest else 0, capacity,
        *_strides(q, batch, out, newest, scale), shared=tuning.shared_bytes(head_dim),
    )  # fmt: skip


def decode_scalar(
    q: Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
    out: Tensor,
    stats: Tensor | None = None,
    newest: Newest | None = None,
    *,
    late: bool = False,
) -> None:
    """The same for any types and any tokens, without tensor cores; with `newest`, for a query head at a time.

    Args: as `decode_mma`, but tokens may be any number of any sequences. `late`: the next kernel is to start
        only when keys and values have been asked for.
    """
    heads, head_dim = out.shape[2:]
    group = heads // cache.num_kv_heads
    rows = 1 if newest else next(n for n in (4, 3, 2, 1) if group % n == 0 and (n == 1 or head_dim <= 128))
    tokens, sequences = q.shape[0], batch.seq_lens.shape[0]
    one_each = batch.max_query_len == 1 and tokens == sequences
    warps = 8 if newest else 4
    tokens_of_lane = _LANE_TOKENS
    if newest:
        at_once = warps * 32 // lanes(head_dim, q.dtype, cache.keys.dtype)
        part = batch.block_table.shape[1] * cache.block_size // out.shape[1]
        tokens_of_lane += part > tokens_of_lane * at_once
    kernel = _decode_scalar(
        q.dtype, cache.keys.dtype, head_dim, cache.block_size, rows, warps, tokens_of_lane, one_each,
        newest is not None, late, _ahead(batch, newest),
    )  # fmt: skip
    launch(
        kernel, (tokens, heads // rows, out.shape[1]), warps * 32,
        *_operands(q, cache, batch, out, stats, newest), sequences, heads, cache.num_kv_heads,
        newest.cos_sin.shape[0] if newest else 0, *_strides(q, batch, out, newest, scale),
    )  # fmt: skip


def merge_parts(partial: Tensor, stats: Tensor, out: Tensor) -> None:
    """Put together parts of contexts.

    Args:
        partial: [T, parts, H, d], each part divided by its sum of weights.
        stats: float32 [T, parts, H, 2]: largest score times log2 e, sum of weights relative to it.
        out: [T, H, d].
    """
    tokens, parts, heads, head_dim = partial.shape
    launch(
        _merge_parts(partial.dtype, head_dim), -(-tokens * heads // 4), 128,
        partial, stats, out, tokens, heads, parts, *out.strides[:2],
    )  # fmt: skip


def _ahead(batch: Batch, newest: Newest | None) -> bool:
    return newest is not None and batch.is_captured_step


def _operands(
    q: Tensor, cache: LayerCache, batch: Batch, out: Tensor, stats: Tensor | None, newest: Newest | None
) -> tuple[Tensor | None, ...]:
    of_batch = batch.block_table, batch.query_start_loc, batch.seq_lens
    if newest is None:
        return q, cache.keys, cache.values, *of_batch, out, stats, None, None, None, None, None
    of_new = batch.positions, batch.slot_mapping, newest.cos_sin, newest.q_norm, newest.k_norm
    return q, cache.keys, cache.values, *of_batch, out, stats, *of_new


def _strides(
    q: Tensor, batch: Batch, out: Tensor, newest: Newest | None, scale: float
) -> tuple[int | float, ...]:
    row, eps = (newest.cos_sin.strides[0], newest.eps) if newest else (0, 0.0)
    q_head = out.shape[3] if newest else q.strides[1]
    return q.strides[0], q_head, *out.strides[:3], batch.block_table.strides[0], row, scale, eps


@remembered
def _decode_mma(
    dtype: DType,
    head_dim: int,
    block_size: int,
    heads: int,
    tuning: Tuning,
    fused: bool,
    ahead: bool,
) -> Kernel:
    return Kernel(
        _FOLDER / "decode_mma.cu", "decode_mma", T=dtype, C=dtype, D=head_dim, BLOCK=block_size, HEADS=heads,
        WARPS=tuning.warps, TILES=tuning.tiles, STAGES=tuning.stages, FUSED=fused, AHEAD=ahead,
    )  # fmt: skip


@remembered
def _decode_scalar(
    dtype: DType,
    cache_dtype: DType,
    head_dim: int,
    block_size: int,
    heads: int,
    warps: int,
    tokens_of_lane: int,
    one_each: bool,
    fused: bool,
    late: bool,
    ahead: bool,
) -> Kernel:
    has_room = head_dim <= 256 and cache_dtype.itemsize <= dtype.itemsize  # in registers
    return Kernel(
        _FOLDER / "decode.cu", "decode", T=dtype, C=cache_dtype, D=head_dim, BLOCK=block_size, HEADS=heads,
        WARPS=warps, BATCH=tokens_of_lane if has_room else 1, ONE_EACH=one_each, FUSED=fused,
        LATE=late, AHEAD=ahead,
    )  # fmt: skip


@remembered
def _merge_parts(dtype: DType, head_dim: int) -> Kernel:
    return Kernel(_FOLDER / "merge_parts.cu", "merge_parts", T=dtype, D=head_dim)
