"""The measurements of `kuiper bench`: what they report hangs together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kuiperllm.config import EngineConfig, ModelConfig
from kuiperllm.engine.bench import BenchModel, BenchResult, run_bench
from kuiperllm.errors import ContextLengthError, UsageError
from tiny_models import BASE

TINY = ModelConfig.from_hf(BASE)
ENGINE = EngineConfig(device="cpu")


def bench(**options: Any) -> BenchResult:
    return run_bench(
        None, ENGINE, **{"config": TINY, "prompt_tokens": 20, "gen_tokens": 4, "repeats": 2, **options}
    )


def test_fields_are_consistent() -> None:
    found = bench()
    assert (found.model, found.device, found.quant, found.dtype) == ("random", "cpu", "none", "bfloat16")
    assert (found.prompt_tokens, found.gen_tokens, found.repeats) == (20, 4, 2)
    assert found.threads >= 1
    matrices = 261 * 64 * 2 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)  # all but the head's padding
    assert 2 * matrices <= found.weight_bytes <= 2 * matrices + 5000
    assert found.weight_bytes - found.bytes_per_token == pytest.approx(2 * 261 * 64, rel=0.05)
    assert found.decode_tokens_per_s == pytest.approx(1e3 / found.decode_ms_per_token)
    kv_per_token = 2 * 2 * 32 * 2
    assert found.decode_bytes_per_s == pytest.approx(
        (found.bytes_per_token + 22 * kv_per_token) * found.decode_tokens_per_s
    )
    assert found.percent_of_bandwidth == pytest.approx(
        100 * found.decode_bytes_per_s / found.read_bandwidth_bytes_per_s
    )
    assert 0 < found.python_ms_per_token < found.decode_ms_per_token
    assert found.prefill_tokens_per_s > 0
    assert found.kv_cache_bytes % kv_per_token == 0
    assert found.peak_memory_bytes > 20 << 20
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert {"python", "numpy", "numba", "kuiperllm"} <= set(found.versions)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("engine", [{"quant": "q8"}, {"dtype": "float32"}])
def test_every_family_runs(family: str, engine: dict[str, str]) -> None:
    config = ModelConfig.from_hf(BASE | {"model_type": family})
    model = BenchModel(config, EngineConfig(device="cpu", **engine))  # type: ignore[arg-type]
    assert str(model.decoder.lm_head.weight.format).startswith(engine.get("quant", engine.get("dtype")))
    for _ in range(2):
        assert model.prefill(70) > 0
        assert model.decode(10, 3) > model.python_s > 0
    assert model._pool.num_free == model._pool.max_blocks


def test_a_stored_model(random_model: Path) -> None:
    found = run_bench(random_model, ENGINE, prompt_tokens=5, gen_tokens=2, repeats=1)
    assert (found.model, found.dtype) == (str(random_model), "float32")


@pytest.mark.parametrize("number", ["prompt_tokens", "gen_tokens", "repeats"])
def test_numbers_below_1(number: str) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        bench(**{number: 0})


def test_more_tokens_than_the_context_holds() -> None:
    with pytest.raises(ContextLengthError, match="context of 256"):
        bench(prompt_tokens=250)
