"""Causal attention over a paged cache of keys and values, and writing to that cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import DType, Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops.attention.cache import LayerCache
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

__all__ = ["CASES", "CONTRACT", "Batch", "LayerCache", "attention", "reference", "write_kv"]

CONTRACT = Contract(
    "attention",
    q="T H d : activation",
    block_table="S B : int32",
    query_start_loc="L : int32",
    seq_lens="S : int32",
    out="T H d : activation",
)
WRITE_CONTRACT = Contract(
    "write_kv", writes=(), k="T K d : activation", v="T K d : activation", slot_mapping="T : int64"
)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Which tokens of which sequences a forward pass is for; the words mean what they mean in vLLM."""

    positions: Tensor
    """int32 [T]: each token's place in its sequence."""
    slot_mapping: Tensor
    """int64 [T]: where each token's key and value go; negative: nowhere."""
    block_table: Tensor
    """int32 [S, B]: the cache blocks of each sequence, in order."""
    query_start_loc: Tensor
    """int32 [S + 1]: the tokens of sequence s are query_start_loc[s] to query_start_loc[s + 1] of T."""
    seq_lens: Tensor
    """int32 [S]: tokens in the cache plus tokens of this pass."""
    max_query_len: int
    """The most tokens of this pass that any sequence has."""
    last_tokens: Tensor | None = None
    """int32 [S]: which of T is the last token of each sequence; None: each has just one."""
    num_single: int = 0
    """How many sequences at the beginning have one token each; kernels may look at these by themselves."""
    is_captured_step: bool = False
    """Whether the pass is a graph of its own, so that all it is told here, and the keys and values of earlier
    tokens, are in memory before its first kernel starts. Kernels may then read them ahead."""

    def split(self) -> tuple[Batch, Batch] | None:
        """The first `num_single` sequences, and the others, whose tokens keep their places among the T.

        None if there are not both.
        """
        first = self.num_single
        if not 0 < first < self.seq_lens.shape[0]:
            return None
        table, starts, lens = self.block_table, self.query_start_loc, self.seq_lens
        single = replace(
            self,
            block_table=table[:first],
            query_start_loc=starts[: first + 1],
            seq_lens=lens[:first],
            max_query_len=1,
            num_single=0,
        )
        others = replace(
            self,
            block_table=table[first:],
            query_start_loc=starts[first:],
            seq_lens=lens[first:],
            num_single=0,
        )
        return single, others


def write_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Put keys and values into the cache.

    Args:
        k: [T, K, d].
        v: [T, K, d].
        cache: of K heads of d.
        slot_mapping: int64 [T], see `LayerCache`; a token with a negative slot is left out.

    Raises:
        ShapeError: the shapes do not match.
    """
    sizes = WRITE_CONTRACT.check(k, v, slot_mapping)
    if (sizes["K"], sizes["d"]) != (cache.num_kv_heads, cache.head_dim):
        raise ShapeError(
            f"write_kv: k {list(k.shape)} does not fit a cache of {cache.num_kv_heads} heads of "
            f"{cache.head_dim}"
        )
    implementation("attention", k.device, k.dtype).write_kv(k, v, cache, slot_mapping)


def attention(
    q: Tensor, cache: LayerCache, batch: Batch, scale: float, *, out: Tensor | None = None
) -> Tensor:
    """softmax(scale * q K^T) V for each token, over the tokens of its sequence up to itself.

    Query head h reads key/value head h // (H / K) (grouped-query attention, Ainslie et al. 2023). The softmax
    is computed block by block with a running maximum (Milakov and Gimelshein 2018; FlashAttention, Dao et al.
    2022), in float32.

    Args:
        q: [T, H, d], rotated.
        cache: holds keys and values of all tokens up to and including those of this pass.
        batch: the sequences.
        scale: usually 1 / sqrt(d).
        out: [T, H, d] (default: a new tensor).

    Raises:
        ShapeError: the shapes do not match, or H is not a multiple of K.
    """
    if out is None:
        out = Tensor.empty(q.shape, q.dtype, q.device)
    sizes = CONTRACT.check(q, batch.block_table, batch.query_start_loc, batch.seq_lens, out)
    if sizes["d"] != cache.head_dim or sizes["H"] % cache.num_kv_heads:
        raise ShapeError(
            f"attention: q {list(q.shape)} does not fit a cache of {cache.num_kv_heads} heads of "
            f"{cache.head_dim}"
        )
    if sizes["L"] != sizes["S"] + 1:
        raise ShapeError(f"attention: query_start_loc has {sizes['L']} entries for {sizes['S']} sequences")
    implementation("attention", q.device, q.dtype).attention(q, cache, batch, scale, out)
    return out


def reference(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    query_lens: list[int],
    seq_lens: list[int],
    scale: float,
) -> NDArray[Any]:
    """The same in float64, on keys and values [sum of seq_lens, K, d] that are not paged."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    out, q0, k0 = np.empty_like(q), 0, 0
    for query_len, seq_len in zip(query_lens, seq_lens, strict=True):
        if not query_len:
            k0 += seq_len
            continue
        keys = np.repeat(k[k0 : k0 + seq_len], repeats, axis=1)
        values = np.repeat(v[k0 : k0 + seq_len], repeats, axis=1)
        scores = scale * np.einsum("thd,shd->hts", q[q0 : q0 + query_len], keys)
        place = np.arange(seq_len - query_len, seq_len)
        scores = np.where(np.arange(seq_len) <= place[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[q0 : q0 + query_len] = np.einsum("hts,shd->thd", weights, values)
        q0, k0 = q0 + query_len, k0 + seq_len
    return out


def paged(
    k: Tensor,
    v: Tensor,
    query_lens: list[int],
    seq_lens: list[int],
    block_size: int,
    dtype: DType,
    *,
    written: list[int] | None = None,
) -> tuple[LayerCache, Batch]:
    """A cache whose blocks are dealt out to sequences in a scrambled order, for cases.

    Args:
        k: keys to write, [sum of `written`, K, d].
        v: values to write.
        query_lens: tokens of each sequence that a pass is for.
        seq_lens: tokens of each sequence, those included.
        block_size: tokens in a block.
        dtype: of the cache.
        written: how many of each sequence's tokens `k` and `v` hold (default: all).
    """
    kv_heads, head_dim = k.shape[1:]
    blocks = [-(-n // block_size) for n in seq_lens]
    order = np.random.default_rng(1).permutation(sum(blocks) + 3).astype(np.int32)
    cache = LayerCache.empty(len(order), block_size, kv_heads, head_dim, dtype, k.device)
    table = np.zeros((len(seq_lens), max(blocks)), np.int32)
    slots, used = [], 0
    for s, (count, length) in enumerate(zip(blocks, seq_lens, strict=True)):
        table[s, :count] = order[used : used + count]
        places = np.arange(length)
        slots.append(table[s, places // block_size].astype(np.int64) * block_size + places % block_size)
        used += count

    def put(values: Any, kind: Any) -> Tensor:
        return Tensor.from_numpy(np.asarray(values, kind)).to(k.device)

    first = [own[:count] for own, count in zip(slots, written or seq_lens, strict=True)]
    write_kv(k, v, cache, put(np.concatenate(first), np.int64))
    last = [own[length - new :] for own, length, new in zip(slots, seq_lens, query_lens, strict=True)]
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    positions = np.concatenate([np.arange(n - m, n) for m, n in zip(query_lens, seq_lens, strict=True)])
    return cache, Batch(
        positions=put(positions, np.int32),
        slot_mapping=put(np.concatenate(last), np.int64),
        block_table=put(table, np.int32),
        query_start_loc=put(starts, np.int32),
        seq_lens=put(seq_lens, np.int32),
        max_query_len=max(query_lens),
    )


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lens: list[int],
    seq_lens: list[int],
    scale: float,
    block_size: int,
    dtype: str,
    single: int,
) -> dict[str, Any]:
    cache, batch = paged(k, v, query_lens, seq_lens, block_size, DType(dtype))
    return {"q": q, "cache": cache, "batch": replace(batch, num_single=single), "scale": scale}


def _reference(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    block_size: int,
    dtype: str,
    single: int,
    **lengths: Any,
) -> NDArray[Any]:
    kind = DType(dtype).numpy
    return reference(q, k.astype(kind), v.astype(kind), **lengths)


def _case(
    name: str,
    query_lens: list[int],
    seq_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int = 32,
    dtype: str = "float32",
    single: int = 0,
    benchmark: bool = False,
) -> Case:
    pairs = sum(m * n - m * (m - 1) // 2 for m, n in zip(query_lens, seq_lens, strict=True))

    def make(rng: np.random.Generator) -> dict[str, Any]:
        tokens, keys = sum(query_lens), sum(seq_lens)
        qkv = rng.standard_normal((tokens, heads + 3, head_dim), np.float32)
        return {
            "q": qkv[:, :heads] * np.float32(2),
            "k": rng.standard_normal((keys, kv_heads, head_dim), np.float32),
            "v": rng.standard_normal((keys, kv_heads, head_dim), np.float32),
            "query_lens": query_lens,
            "seq_lens": seq_lens,
            "scale": head_dim**-0.5,
            "block_size": block_size,
            "dtype": dtype,
            "single": single,
        }

    return Case(
        f"{name}-{dtype}",
        attention,
        _reference,
        make,
        rtol=2e-5,
        atol=2e-5,
        activations=("q", "k", "v"),
        prepare=_prepare,
        benchmark=benchmark,
        operations=4 * heads * head_dim * pairs,
    )


CASES = [
    case
    for dtype in ("float32", "float16", "bfloat16")
    for case in (
        _case("first-token", [1], [1], 2, 1, 2, dtype=dtype),
        _case("decode", [1], [77], 8, 2, 64, dtype=dtype),
        _case("decode-7-per-head", [1], [33], 14, 2, 64, dtype=dtype),
        _case("decode-long", [1], [700], 4, 4, 16, dtype=dtype),
        _case("decode-longer", [1], [2500], 4, 1, 128, dtype=dtype),
        _case("decode-batch", [1, 1, 1], [1, 32, 65], 6, 2, 128, dtype=dtype),
        _case("prefill", [70], [70], 8, 2, 64, dtype=dtype),
        _case("prefill-chunk", [33], [100], 4, 1, 80, dtype=dtype),
        _case("mixed", [5, 1, 31, 1], [5, 64, 63, 200], 6, 3, 20, dtype=dtype),
        _case("split", [1, 1, 5, 1, 31], [64, 200, 5, 7, 63], 6, 3, 20, single=2, dtype=dtype),
        _case("split-padded", [1, 1, 5, 0, 0], [64, 1, 40, 0, 0], 6, 3, 64, single=2, dtype=dtype),
        _case("split-long", [1, 40], [900, 70], 4, 2, 64, single=1, dtype=dtype),
        _case("block-16", [17], [47], 3, 3, 36, block_size=16, dtype=dtype),
        _case("block-64", [9, 1], [130, 64], 4, 2, 32, block_size=64, dtype=dtype),
    )
] + [  # edges of the tiles of kernels: 16, 64 or 128 queries and keys, 16 heads, 16 elements
    _case("prefill-whole-tile", [64], [64], 2, 2, 64, dtype="bfloat16"),
    _case("prefill-past-tile", [65], [129], 2, 1, 64, dtype="bfloat16"),
    _case("prefill-8-per-head", [17], [128], 8, 1, 128, dtype="bfloat16"),
    _case("prefill-7-per-head", [127, 3], [127, 130], 7, 1, 64, block_size=16, dtype="float16"),
    _case("prefill-chunks", [128, 1, 2], [191, 128, 66], 2, 2, 128, block_size=64, dtype="float16"),
    _case("prefill-head-96", [20], [90], 4, 2, 96, dtype="float16"),
    _case("prefill-head-40", [19], [35], 4, 2, 40, dtype="bfloat16"),
    _case("prefill-head-256", [20], [50], 4, 2, 256, dtype="bfloat16"),
    _case("decode-head-40", [1, 1], [35, 16], 4, 2, 40, dtype="bfloat16"),
    _case("decode-head-256", [1], [300], 4, 1, 256, dtype="float16"),
    _case("decode-20-per-head", [1, 1], [17, 150], 20, 1, 32, dtype="bfloat16"),
    _case("decode-block-48", [1], [100], 4, 2, 64, block_size=48, dtype="bfloat16"),
    _case("decode-2048", [1], [2048], 32, 8, 64, dtype="bfloat16", benchmark=True),
    _case("prefill-512", [512], [512], 32, 8, 64, dtype="bfloat16", benchmark=True),
]
