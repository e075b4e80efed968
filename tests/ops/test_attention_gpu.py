"""Attention on a real GPU at real sizes, in caches that hold NaN wherever no token lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kuiperllm.backends.cuda.launch import chip
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.attention import Batch, LayerCache, attention, cuda, cuda_hopper, paged, reference

pytestmark = pytest.mark.gpu

BF16, F16 = DType.bfloat16, DType.float16
TOLERANCE = {BF16: 2e-2, F16: 3e-3}
"""Values are standard normal, so results are below about 4: rounding of weights, values and results."""

# query lengths, sequence lengths, query heads, key/value heads, head_dim, tokens of a cache block, type
PREFILLS = [
    ([1, 2], [1, 2], 1, 1, 64, 32, BF16),
    ([16], [16], 4, 1, 128, 32, BF16),
    ([63, 65, 64], [63, 65, 64], 4, 4, 64, 32, BF16),
    ([127, 128, 129], [127, 128, 129], 4, 2, 128, 32, F16),
    ([128], [128], 8, 1, 128, 16, BF16),
    ([130], [333], 7, 1, 64, 64, F16),
    ([257], [400], 14, 2, 64, 32, BF16),
    ([40], [500], 2, 1, 128, 16, BF16),
    ([520], [521], 3, 3, 64, 256, F16),
    ([250], [255], 4, 2, 128, 64, BF16),
    ([3, 1, 140, 1, 300], [100, 64, 141, 700, 300], 8, 2, 128, 32, BF16),
    ([1, 385, 1], [2000, 1999, 1], 4, 1, 64, 128, F16),
    ([1000], [1000], 8, 2, 128, 32, BF16),
    ([2048], [2048], 4, 1, 64, 32, BF16),
    ([600], [2600], 4, 1, 128, 32, F16),
    ([2000], [3001], 4, 2, 128, 16, BF16),
]
DECODES = [
    ([1], 4, 1, 128, 32, BF16),
    ([17], 32, 8, 64, 32, BF16),
    ([1000], 32, 8, 64, 32, BF16),
    ([1025], 14, 2, 64, 16, F16),
    ([8192], 32, 8, 128, 32, BF16),
    ([8191], 16, 8, 128, 64, F16),
    ([32_768], 8, 2, 64, 32, BF16),
    ([5000], 20, 1, 96, 32, BF16),
    ([3000], 8, 1, 256, 32, BF16),
    ([100, 1, 999, 64, 512, 33, 1500, 800], 32, 8, 128, 32, BF16),
    (list(range(1, 1000, 16)), 32, 8, 64, 32, BF16),
]


def _name(value: Any) -> str:
    return str(value) if isinstance(value, int | DType) else f"{len(value)}x{max(value)}"


@pytest.mark.parametrize("kernel", ["hopper", "any chip"])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "heads", "kv_heads", "head_dim", "block_size", "dtype"), PREFILLS, ids=_name
)
def test_prefill(
    query_lens: list[int],
    seq_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: DType,
    kernel: str,
    cuda_device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernel == "hopper" and not chip(cuda_device).is_hopper:
        pytest.skip("not a Hopper GPU")
    monkeypatch.setattr(cuda, "USE_HOPPER", kernel == "hopper")
    used = []
    prefill = cuda_hopper.prefill
    monkeypatch.setattr(cuda_hopper, "prefill", lambda *a, **k: (used.append(1), prefill(*a, **k)))
    _check(query_lens, seq_lens, heads, kv_heads, head_dim, block_size, dtype, cuda_device)
    assert bool(used) == (kernel == "hopper")


@pytest.mark.parametrize(
    ("seq_lens", "heads", "kv_heads", "head_dim", "block_size", "dtype"), DECODES, ids=_name
)
def test_decode(
    seq_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: DType,
    cuda_device: Device,
) -> None:
    _check([1] * len(seq_lens), seq_lens, heads, kv_heads, head_dim, block_size, dtype, cuda_device)


def test_prefill_is_repeatable(cuda_device: Device) -> None:
    """Whatever the warps that copy and those that multiply do first, the result is the same, bit by bit."""
    q, _, _, cache, batch = _inputs([1500], [1700], 8, 2, 128, 32, BF16, cuda_device)
    first = attention(q, cache, batch, 128**-0.5).numpy().view(np.uint16)
    for _ in range(20):
        again = attention(q, cache, batch, 128**-0.5).numpy().view(np.uint16)
        np.testing.assert_array_equal(again, first)


@pytest.fixture(name="cuda_device")
def _cuda_device(cuda: Device) -> Device:
    """The fixture `cuda`, by a name that leaves that of the kernels' module alone."""
    return cuda


def _check(
    query_lens: list[int],
    seq_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: DType,
    device: Device,
) -> None:
    q, k, v, cache, batch = _inputs(
        query_lens, seq_lens, heads, kv_heads, head_dim, block_size, dtype, device
    )
    scale = head_dim**-0.5
    found = attention(q, cache, batch, scale).numpy().astype(np.float32)
    wide = (x.astype(np.float32) for x in (q.numpy(), k, v))
    np.testing.assert_allclose(
        found, reference(*wide, query_lens, seq_lens, scale), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def _inputs(
    query_lens: list[int],
    seq_lens: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: DType,
    device: Device,
) -> tuple[Tensor, Any, Any, LayerCache, Batch]:
    """Queries that lie in rows of a fused projection; keys and values; a cache and a batch of them."""
    rng = np.random.default_rng(0)
    tokens, keys = sum(query_lens), sum(seq_lens)
    qkv = (2 * rng.standard_normal((tokens, heads + 3, head_dim), np.float32)).astype(dtype.numpy)
    k, v = (rng.standard_normal((keys, kv_heads, head_dim), np.float32).astype(dtype.numpy) for _ in "kv")
    q = Tensor.from_numpy(qkv).to(device)[:, :heads]
    keys_given, values_given = (Tensor.from_numpy(x).to(device) for x in (k, v))
    cache, batch = paged(keys_given, values_given, query_lens, seq_lens, block_size, dtype)
    _poison(cache, batch, seq_lens)
    return q, k, v, cache, batch


def _poison(cache: LayerCache, batch: Batch, seq_lens: list[int]) -> None:
    """NaN wherever no token of a sequence lies."""
    table, used = batch.block_table.numpy(), np.zeros((cache.num_blocks, cache.block_size), bool)
    for blocks, length in zip(table, seq_lens, strict=True):
        places = np.arange(length)
        used[blocks[places // cache.block_size], places % cache.block_size] = True
    for memory in (cache.keys, cache.values):
        values = memory.numpy().copy()
        values.swapaxes(1, 2)[~used] = np.nan
        memory.copy_(Tensor.from_numpy(values).to(memory.device))
