"""Prompts that a GPU replays from graphs give what a CPU gives, in any order of lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kuiperllm import LLM, SamplingParams
from kuiperllm.core import Device
from kuiperllm.engine.mixed_pass import captured_length
from tiny_models import BASE, random_weights, write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", BASE, random_weights(BASE))


def test_lengths_are_padded_to_the_next(cuda: Device) -> None:
    assert [captured_length(n) for n in (1, 16, 17, 100, 2048, 2049)] == [16, 16, 32, 128, 2048, None]


def test_prompts_in_any_order_give_what_a_cpu_gives(model: Path, cuda: Device) -> None:
    """Each length comes three times: run, captured and replayed; the graphs share their memory."""
    lengths = [5, 40, 16, 5, 40, 33, 5, 16, 40, 60, 33, 16, 60, 33, 60]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 250, length).tolist() for length in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    expected = LLM(model, device="cpu", max_model_len=128).generate(prompts, params)
    gpu = LLM(model, device="cuda:0", max_model_len=128)
    found = [gpu.generate([prompt], params)[0] for prompt in prompts]
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]
    captured = {
        key[0] for key, prefill in gpu._engine.runner.passes._prompts.items() if prefill.captured is not None
    }
    assert captured == {16, 48, 64}
