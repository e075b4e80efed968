"""Self-attention from the projected queries, keys and values to the residual stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops.attention import Batch, LayerCache, attention, paged
from kuiperllm.ops.attention import reference as attention_reference
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation
from kuiperllm.ops.linear import LinearWeight, pack
from kuiperllm.ops.norm_linear import check_weight
from kuiperllm.ops.rms_norm import reference as norm_reference
from kuiperllm.ops.rope import reference as rope_reference

CONTRACT = Contract(
    "self_attention",
    writes=("residual",),
    qkv="T N : activation",
    residual="T D : activation",
    cos_sin="P d",
    q_norm="d",
    k_norm="d",
    positions="T : int32",
    slot_mapping="T : int64",
    block_table="S B : int32",
    query_start_loc="L : int32",
    seq_lens="S : int32",
)


def self_attention(
    qkv: Tensor,
    residual: Tensor,
    cache: LayerCache,
    batch: Batch,
    projection: LinearWeight,
    *,
    cos_sin: Tensor,
    scale: float,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Attend, and add the output projection of the result to the residual stream.

    Heads of q and k are normalized if there are norms for them, and turned by their positions; keys and
    values go to the cache; then grouped-query attention, the projection, the sum.

    Args:
        qkv: [T, (H + 2K) d]: H heads of queries, K of keys, K of values. Overwritten.
        residual: [T, D], is added to.
        cache: K heads of d; holds the earlier tokens.
        batch: the sequences.
        projection: the output projection, [D, H d].
        cos_sin: float32 [P, d], see `rope`.
        scale: of the scores, usually 1 / sqrt(d).
        q_norm: float32 [d], the weight of the norm of each query head.
        k_norm: float32 [d], the same for keys; both or neither.
        eps: of these norms.

    Returns:
        `residual`.

    Raises:
        ShapeError: the shapes do not match, or there is only one of the norms.
        DTypeError: a tensor has another type than stated.
        DeviceError: the operands live on different devices.
    """
    sizes = CONTRACT.check(
        qkv, residual, cos_sin, q_norm, k_norm, batch.positions, batch.slot_mapping, batch.block_table,
        batch.query_start_loc, batch.seq_lens,
    )  # fmt: skip
    head_dim, kv_heads = cache.head_dim, cache.num_kv_heads
    heads, rest = divmod(sizes["N"] - 2 * kv_heads * head_dim, head_dim)
    if heads < 1 or rest or heads % kv_heads or sizes["d"] != head_dim:
        raise ShapeError(
            f"self_attention: qkv {list(qkv.shape)} and cos_sin {list(cos_sin.shape)} do not fit a cache of "
            f"{kv_heads} heads of {head_dim}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ShapeError("self_attention: give both q_norm and k_norm, or neither")
    if sizes["L"] != sizes["S"] + 1:
        raise ShapeError(
            f"self_attention: query_start_loc has {sizes['L']} entries for {sizes['S']} sequences"
        )
    check_weight("self_attention", projection, qkv, heads * head_dim, sizes["D"])
    implementation("self_attention", qkv.device, qkv.dtype).self_attention(
        qkv, residual, cache, batch, projection, cos_sin, scale, q_norm, k_norm, eps
    )
    return residual


def reference(
    qkv: NDArray[Any],
    residual: NDArray[Any],
    probe: NDArray[Any],
    past_k: NDArray[Any],
    past_v: NDArray[Any],
    projection: NDArray[Any],
    cos_sin: NDArray[Any],
    query_lens: list[int],
    past_lens: list[int],
    q_norm: NDArray[Any] | None = None,
    k_norm: NDArray[Any] | None = None,
    block_size: int = 32,
    captured: bool = False,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The new residual, and what `probe` then finds in the cache."""
    kv_heads, head_dim = past_k.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    parts = qkv.reshape(len(qkv), -1, head_dim)
    q, k, v = np.split(parts, [heads, heads + kv_heads], axis=1)
    if q_norm is not None and k_norm is not None:
        q, k = norm_reference(q, q_norm, _EPS), norm_reference(k, k_norm, _EPS)
    positions = np.concatenate(
        [np.arange(past, past + new) for new, past in zip(query_lens, past_lens, strict=True)]
    )
    q, k = rope_reference(q, positions, cos_sin), rope_reference(k, positions, cos_sin)
    keys, values = (_joined(*pair, past_lens, query_lens) for pair in ((past_k, k), (past_v, v)))
    seq_lens = [new + past for new, past in zip(query_lens, past_lens, strict=True)]
    scale = head_dim**-0.5
    mixed = attention_reference(q, keys, values, query_lens, seq_lens, scale)
    total = residual + mixed.reshape(len(qkv), -1) @ projection.astype(np.float64).T
    return total, attention_reference(probe, keys, values, query_lens, seq_lens, scale)


def _joined(past: NDArray[Any], new: NDArray[Any], past_lens: list[int], new_lens: list[int]) -> NDArray[Any]:
    """Each sequence's past rows, then its new ones."""
    pasts = np.split(past, np.cumsum(past_lens)[:-1])
    news = np.split(new, np.cumsum(new_lens)[:-1])
    return np.concatenate([part for pair in zip(pasts, news, strict=True) for part in pair])


_EPS = 1e-6


def _probed(probe: Tensor, **arguments: Any) -> Tensor:
    """`self_attention`, then what another query finds in the cache it left: the keys and values themselves
    lie as the device likes."""
    self_attention(**arguments)
    return attention(probe, arguments["cache"], arguments["batch"], arguments["scale"])


_probed.__name__ = "self_attention"


def _prepare(
    qkv: Tensor,
    residual: Tensor,
    probe: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    projection: Tensor,
    cos_sin: Tensor,
    query_lens: list[int],
    past_lens: list[int],
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    block_size: int = 32,
    captured: bool = False,
) -> dict[str, Any]:
    seq_lens = [new + past for new, past in zip(query_lens, past_lens, strict=True)]
    cache, batch = paged(past_k, past_v, query_lens, seq_lens, block_size, qkv.dtype, written=past_lens)
    return {
        "probe": probe,
        "qkv": qkv,
        "residual": residual,
        "cache": cache,
        "batch": replace(batch, is_captured_step=captured),
        "projection": pack(projection, None, qkv.device),
        "cos_sin": cos_sin,
        "scale": past_k.shape[2] ** -0.5,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "eps": _EPS,
    }


def _case(
    name: str,
    query_lens: list[int],
    past_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    hidden: int = 48,
    norms: bool = False,
    block_size: int = 32,
    captured: bool = False,
) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        tokens, past = sum(query_lens), sum(past_lens)
        longest = max(a + b for a, b in zip(query_lens, past_lens, strict=True))
        angles = rng.uniform(0, 2 * np.pi, (longest, head_dim // 2))
        width = heads * head_dim
        projection = rng.standard_normal((hidden, width), np.float32) / np.float32(np.sqrt(width))
        made: dict[str, Any] = {
            "qkv": rng.standard_normal((tokens, (heads + 2 * kv_heads) * head_dim), np.float32),
            "residual": rng.standard_normal((tokens, hidden), np.float32),
            "probe": rng.standard_normal((tokens, heads, head_dim), np.float32),
            "past_k": rng.standard_normal((past, kv_heads, head_dim), np.float32),
            "past_v": rng.standard_normal((past, kv_heads, head_dim), np.float32),
            "projection": projection,
            "cos_sin": np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32),
            "query_lens": query_lens,
            "past_lens": past_lens,
            "block_size": block_size,
            "captured": captured,
        }
        if norms:
            made["q_norm"], made["k_norm"] = rng.uniform(0.5, 1.5, (2, head_dim)).astype(np.float32)
        return made

    return Case(
        name,
        _probed,
        reference,
        make,
        rtol=2e-5,
        atol=5e-5,
        writes=("residual",),
        activations=("qkv", "residual", "probe", "past_k", "past_v", "projection"),
        prepare=_prepare,
    )


CASES = [
    _case("first-token", [1], [0], 2, 1, 16),
    _case("decode", [1], [76], 8, 2, 64),
    _case("decode-captured", [1], [76], 8, 2, 64, captured=True),
    _case("decode-norms", [1], [130], 4, 2, 128, norms=True),
    _case("decode-norms-captured", [1], [33], 4, 4, 32, norms=True, captured=True),
    _case("decode-7-per-head", [1], [31], 14, 2, 64, hidden=56),
    _case("decode-odd-head", [1], [40], 3, 3, 20, hidden=50),
    _case("decode-long", [1], [700], 4, 2, 64, block_size=16),
    _case("decode-longer", [1], [2600], 4, 2, 64, captured=True),
    _case("decode-longer-wide", [1], [2300], 4, 1, 128),
    _case("decode-batch", [1, 1, 1], [0, 31, 64], 6, 2, 64),
    _case("decode-batch-captured", [1, 1, 1, 1], [5, 32, 200, 63], 4, 1, 64, captured=True),
    _case("decode-wide-batch", [1] * 11, list(range(1, 111, 10)), 4, 2, 64),
    _case("prefill", [70], [0], 8, 2, 64),
    _case("prefill-norms", [33], [0], 4, 2, 128, norms=True),
    _case("prefill-chunk", [33], [67], 4, 1, 80),
    _case("short-prefill", [5], [0], 4, 2, 64),
    _case("mixed", [5, 1, 31, 1], [0, 63, 32, 199], 6, 3, 20, norms=True),
]
