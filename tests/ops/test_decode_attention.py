"""Attention of single tokens on tensor cores, however its kernel is told to go about its work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kuiperllm.backends.cuda.launch import chip
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.attention import Batch, paged, reference
from kuiperllm.ops.attention.cuda_decode import Newest, Tuning, decode_mma, tuning_for
from kuiperllm.ops.rms_norm import reference as norm_reference
from kuiperllm.ops.rope import reference as rope_reference

BF16, F16 = DType.bfloat16, DType.float16
TOLERANCE = {BF16: 2e-2, F16: 3e-3}
EPS = 1e-6

# tokens before the new one, query and key/value heads, head_dim, tokens of a cache block, parts, tuning, type
WAYS = [
    ([0], 4, 1, 64, 32, 2, Tuning(8, 4, 1), BF16),
    ([1, 255, 256, 31], 7, 1, 64, 32, 1, Tuning(8, 4, 2), BF16),
    ([700, 15, 16], 8, 2, 64, 16, 3, Tuning(2, 4, 3), F16),
    ([95, 96, 97], 6, 3, 64, 48, 2, Tuning(1, 2, 5), BF16),
    ([130, 127], 4, 1, 128, 32, 2, Tuning(8, 2, 2), BF16),
    ([600], 8, 1, 128, 16, 1, Tuning(4, 1, 4), F16),
    ([601, 64], 2, 2, 128, 64, 4, Tuning(2, 2, 3), BF16),
    ([70, 333], 3, 1, 256, 32, 2, Tuning(4, 1, 2), BF16),
    ([90], 12, 1, 32, 32, 2, Tuning(4, 4, 3), F16),
    ([40, 7], 4, 2, 96, 32, 2, Tuning(2, 2, 2), BF16),
    ([33], 5, 1, 16, 16, 1, Tuning(2, 2, 2), F16),
]


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "ahead"])
@pytest.mark.parametrize(
    ("past_lens", "heads", "kv_heads", "head_dim", "block_size", "parts", "tuning", "dtype"),
    WAYS,
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value),
)
def test_new_tokens(
    past_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    parts: int,
    tuning: Tuning,
    dtype: DType,
    captured: bool,
    cuda: Device,
) -> None:
    """Raw queries and keys are normalized and rotated, and what is new gets into the cache."""
    rng = np.random.default_rng(0)
    tokens, scale = len(past_lens), head_dim**-0.5
    qkv = _values(rng, (tokens, heads + 2 * kv_heads, head_dim), dtype)
    past_k, past_v = (_values(rng, (sum(past_lens), kv_heads, head_dim), dtype) for _ in "kv")
    angles = rng.uniform(0, 2 * np.pi, (max(past_lens) + 1, head_dim // 2))
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32)
    q_norm, k_norm = rng.uniform(0.5, 1.5, (2, head_dim)).astype(np.float32)
    cache, batch = paged(
        Tensor.from_numpy(past_k).to(cuda), Tensor.from_numpy(past_v).to(cuda), [1] * tokens,
        [n + 1 for n in past_lens], block_size, dtype, written=past_lens,
    )  # fmt: skip
    on_device = [Tensor.from_numpy(x).to(cuda) for x in (cos_sin, q_norm, k_norm)]
    partial = Tensor.empty((tokens, parts, heads, head_dim), dtype, cuda)
    stats = Tensor.empty((tokens, parts, heads, 2), DType.float32, cuda)
    raw = Tensor.from_numpy(qkv.reshape(tokens, -1)).to(cuda)
    cuda.synchronize()
    decode_mma(
        raw, cache, replace(batch, is_captured_step=captured), scale, partial, stats,
        Newest(*on_device, EPS), tuning,
    )  # fmt: skip

    q, k, v = np.split(qkv.astype(np.float64), [heads, heads + kv_heads], axis=1)
    positions = np.array(past_lens)
    q = rope_reference(norm_reference(q, q_norm, EPS), positions, cos_sin)
    k = rope_reference(norm_reference(k, k_norm, EPS), positions, cos_sin)
    keys, values = (_joined(*pair, past_lens) for pair in ((past_k, k), (past_v, v)))
    expected = reference(q, keys, values, [1] * tokens, [n + 1 for n in past_lens], scale)
    _compare(_merged(partial, stats), expected, dtype)
    for row, (new_k, new_v) in enumerate(zip(k, v, strict=True)):
        _compare(_cached(cache.keys, batch, row), new_k, dtype)
        _compare(_cached(cache.values, batch, row), new_v, dtype)


@pytest.mark.parametrize("parts", [1, 5])
def test_prepared_queries(parts: int, cuda: Device) -> None:
    """Without raw heads: queries are taken as they are, everything else is in the cache already, and
    sequences with several new tokens are left alone."""
    rng = np.random.default_rng(1)
    query_lens, seq_lens = [1, 3, 1, 1], [77, 40, 1, 600]
    q = _values(rng, (sum(query_lens), 8, 64), BF16)
    k, v = (_values(rng, (sum(seq_lens), 2, 64), BF16) for _ in "kv")
    cache, batch = paged(
        Tensor.from_numpy(k).to(cuda), Tensor.from_numpy(v).to(cuda), query_lens, seq_lens, 32, BF16
    )
    out = Tensor.full((len(q), parts, 8, 64), 7.0, BF16, cuda)
    stats = Tensor.full((len(q), parts, 8, 2), 1.0, DType.float32, cuda)
    on_device = Tensor.from_numpy(q).to(cuda)
    cuda.synchronize()
    decode_mma(on_device, cache, batch, 0.125, out, stats)
    expected = reference(*(x.astype(np.float64) for x in (q, k, v)), query_lens, seq_lens, 0.125)
    alone = [0, 4, 5]
    _compare(_merged(out, stats)[alone], expected[alone], BF16)
    assert (out.numpy()[1:4].astype(np.float32) == 7).all()


def test_rule_of_thumb(cuda: Device) -> None:
    """Heads of all lengths get rings of about the same size, if there is room for them."""
    big, small = (replace(chip(cuda), max_shared_bytes=size) for size in (232_448, 101_376))
    assert [tuning_for(big, d).tiles for d in (16, 64, 80, 128, 144, 256)] == [4, 2, 1, 1, 1, 1]
    assert [tuning_for(gpu, d).stages for gpu in (big, small) for d in (64, 128, 256)] == [3, 3, 3, 3, 3, 2]
    assert [tuning_for(gpu, 128, is_alone=True).stages for gpu in (big, small)] == [5, 3]
    for d in range(16, 257, 16):
        assert tuning_for(small, d).shared_bytes(d) <= small.max_shared_bytes - 16 * d - 1024


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
    return rng.standard_normal(shape, np.float32).astype(dtype.numpy)


def _joined(past: NDArray[Any], new: NDArray[Any], past_lens: list[int]) -> NDArray[Any]:
    """Each sequence's past rows, then its new one."""
    pasts = np.split(past.astype(np.float64), np.cumsum(past_lens)[:-1])
    return np.concatenate([part for s, own in enumerate(pasts) for part in (own, new[s : s + 1])])


def _merged(partial: Tensor, stats: Tensor) -> NDArray[np.float64]:
    """The parts together: [T, H, d]."""
    top, total = np.moveaxis(stats.numpy().astype(np.float64), -1, 0)
    weight = np.exp2(top - top.max(1, keepdims=True)) * total
    found = np.where(weight[..., None] > 0, partial.numpy().astype(np.float64), 0.0)
    return np.asarray((found * weight[..., None]).sum(1) / weight.sum(1)[..., None])


def _cached(rows: Tensor, batch: Batch, sequence: int) -> NDArray[Any]:
    """The newest row of a sequence: [K, d]."""
    block, place = divmod(int(batch.slot_mapping.numpy()[sequence]), rows.shape[2])
    return np.asarray(rows.numpy()[block, :, place])


def _compare(found: NDArray[Any], expected: NDArray[Any], dtype: DType) -> None:
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=tolerance, atol=tolerance)
