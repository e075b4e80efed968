"""What fits is known before it is loaded, what does not is refused, and what grows survives an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kuiperllm import (
    LLM,
    Device,
    DType,
    ModelConfig,
    OutOfMemoryError,
    SamplingParams,
    UsageError,
)
from kuiperllm.core.memory import MemoryInfo
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.ops.attention import LayerCache
from tiny_models import BASE, Weights, random_weights

Idle = Callable[[LLM], None]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = ["a", "Once upon a time there was", "x" * 70, "b", "hello world", "c" * 33, "a"]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(BASE)


def with_free_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(type(Device("cpu")), "memory_info", lambda self: MemoryInfo(free, 2 * free))


KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32


@pytest.fixture(scope="module")
def weight_bytes(weights: Weights) -> int:
    return sum(values.nbytes for values in weights.values())


def test_weights_that_do_not_fit(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, weight_bytes: int
) -> None:
    with_free_memory(monkeypatch, weight_bytes)
    before = Device("cpu").allocator.stats().allocated_bytes
    needs, has = (weight_bytes + 64 * KV_BYTES_PER_TOKEN) / 1024, weight_bytes / 1024
    with pytest.raises(OutOfMemoryError, match=rf"needs {needs:.0f} KiB, has {has:.0f} KiB free"):
        LLM(random_model)
    assert Device("cpu").allocator.stats().allocated_bytes <= before


def test_a_context_that_does_not_fit(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, weight_bytes: int
) -> None:
    with_free_memory(monkeypatch, weight_bytes + 100 * KV_BYTES_PER_TOKEN)
    with pytest.raises(OutOfMemoryError, match="smaller max_model_len"):
        LLM(random_model, max_model_len=101)
    assert LLM(random_model, max_model_len=100).max_model_len == 100


def test_the_context_is_cut_to_what_fits(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, weight_bytes: int
) -> None:
    with_free_memory(monkeypatch, weight_bytes + 100 * KV_BYTES_PER_TOKEN)
    llm = LLM(random_model)
    assert llm.max_model_len == 90  # nine tenths
    # and there are no more blocks than memory has room for, so other sequences wait
    assert llm._engine.pool.max_blocks == 3
    done = llm.generate(["a" * 30, "b" * 30, "c"], SamplingParams(temperature=0.0, ignore_eos=True))
    assert [len(d.prompt_token_ids) + len(d.token_ids) for d in done] == [90, 90, 90]
    with_free_memory(monkeypatch, weight_bytes + 64 * KV_BYTES_PER_TOKEN)
    assert LLM(random_model).max_model_len == 64


def test_max_model_len_may_exceed_what_the_file_states(
    random_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(random_model, max_model_len=300)
    assert "states only 256 positions" in caplog.text
    done = llm.generate("a", SamplingParams(temperature=0.0, ignore_eos=True))[0]
    assert len(done.prompt_token_ids) + len(done.token_ids) == 300


def test_running_out_of_memory_while_the_cache_grows(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, assert_idle: Idle
) -> None:
    llm = LLM(random_model, block_size=16)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=20)
    expected = [done.token_ids for done in llm.generate(PROMPTS[:2], params)]
    second, grown = llm._engine.runner.cache.layers[1], LayerCache.grown
    monkeypatch.setattr(LayerCache, "grown", lambda s, n: _out_of_memory() if s is second else grown(s, n))
    with pytest.raises(OutOfMemoryError, match="needs 2 KiB"):
        llm.generate(["x" * 250, "y" * 250], params)
    assert_idle(llm)
    assert llm._engine.pool.num_blocks == 16
    assert [done.token_ids for done in llm.generate(PROMPTS[:2], params)] == expected
    monkeypatch.undo()
    assert len(llm.generate(["x" * 230, "y" * 230], params)[1].token_ids) == 20


def test_a_cache_that_could_not_grow_can_grow_less(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(ModelConfig.from_hf(BASE), 16, DType.float32, Device("cpu"))
    cache.reserve(2)
    for number, layer in enumerate(cache.layers):
        layer.keys.numpy()[:] = number + 1
    second, grown = cache.layers[1], LayerCache.grown
    monkeypatch.setattr(LayerCache, "grown", lambda s, n: _out_of_memory() if s is second else grown(s, n))
    with pytest.raises(OutOfMemoryError):
        cache.reserve(9)
    monkeypatch.undo()
    assert cache.num_blocks == 2
    cache.reserve(4)
    assert cache.num_blocks == 4
    assert [layer.num_blocks >= 4 for layer in cache.layers] == [True, True]
    assert [set(layer.keys.numpy()[:2].flatten()) for layer in cache.layers] == [{1.0}, {2.0}]


def _out_of_memory() -> LayerCache:
    raise OutOfMemoryError("cpu memory: needs 2 KiB, has 1 KiB free")


def test_outgrown_caches_do_not_stay_in_memory() -> None:
    allocator = Device("cpu").allocator
    allocator.empty_cache()
    before = allocator.stats().reserved_bytes
    cache = KVCache(ModelConfig.from_hf(BASE | {"num_hidden_layers": 4}), 32, DType.float32, Device("cpu"))
    allocator.reset_peak()
    for num_blocks in (300, 600, 1200):
        cache.reserve(num_blocks)
    stats = allocator.stats()
    assert cache.nbytes == 1200 * 32 * 2 * KV_BYTES_PER_TOKEN
    assert stats.reserved_bytes - before < 1.01 * cache.nbytes
    # while it grew, one layer was there twice at most: half of the last one, and a copy in the making
    assert stats.peak_reserved_bytes - before < 1.2 * cache.nbytes


def test_a_cache_of_a_given_size(random_model: Path) -> None:
    llm = LLM(random_model, kv_cache_tokens=100, block_size=16)
    assert (llm.max_model_len, llm._engine.pool.max_blocks) == (100, 7)
    done = llm.generate(PROMPTS, GREEDY)
    assert [len(each.token_ids) for each in done] == [20] * len(PROMPTS)
    assert llm._engine.pool.num_blocks == 7
    with pytest.raises(UsageError, match="kv_cache_tokens=50 has no room for max_model_len=51"):
        LLM(random_model, kv_cache_tokens=50, max_model_len=51)


def test_what_would_fit_is_said(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, weight_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with_free_memory(monkeypatch, weight_bytes + 1000 * KV_BYTES_PER_TOKEN)
    with pytest.raises(OutOfMemoryError, match=r"use a smaller max_model_len: 900 fit$"):
        LLM(random_model, max_model_len=1001)
    with_free_memory(monkeypatch, weight_bytes // 2)
    with pytest.raises(OutOfMemoryError, match=r"use quant='q8', with which the weights take \d+ KiB$"):
        LLM(random_model)
    with_free_memory(monkeypatch, 10_000)
    with pytest.raises(OutOfMemoryError, match=r"use a smaller model$"):
        LLM(random_model)
    monkeypatch.undo()
    with caplog.at_level("INFO"):
        LLM(random_model, max_num_seqs=5, max_model_len=100, block_size=16)
    assert re.search(
        r"weights \d+ KiB, KV cache 280 KiB = 560 tokens of 512 bytes, at most 5 requests of up to "
        r"100 tokens at once; ",
        caplog.text,
    )
