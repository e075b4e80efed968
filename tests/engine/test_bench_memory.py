"""A model of random weights that cannot fit is refused before memory is touched."""

from __future__ import annotations

import pytest

from kuiperllm.config import EngineConfig, ModelConfig
from kuiperllm.engine.bench import run_bench
from kuiperllm.errors import OutOfMemoryError


def test_random_weights_that_do_not_fit_are_refused_at_once() -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 1 << 20,
            "hidden_size": 1 << 16,
            "intermediate_size": 1 << 18,
            "num_hidden_layers": 200,
            "num_attention_heads": 512,
        }
    )
    with pytest.raises(OutOfMemoryError, match=r"cpu memory: needs [\d.]+ GiB, has [\d.]+ GiB free"):
        run_bench(None, EngineConfig(quant="q8"), config=config)
