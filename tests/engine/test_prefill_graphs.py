"""Passes over prompts that a GPU replays from graphs give what a CPU gives, in any order of shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kuiperllm import LLM, SamplingParams
from kuiperllm.core import Device
from kuiperllm.engine.core import Engine
from kuiperllm.engine.mixed_pass import Shape
from kuiperllm.engine.request import Request
from tiny_models import BASE, random_weights, write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", BASE, random_weights(BASE))


def captured_shapes(llm: LLM) -> list[Shape]:
    mixed = llm._engine.runner.passes._mixed
    return [shape for shape, made in mixed.items() if made.captured is not None]


def test_shapes_are_padded_to_one_of_a_few() -> None:
    def padded(tokens: int, single: int = 0, pieces: int = 1, room: int = 0) -> tuple[int, ...] | None:
        shape = Shape(tokens, single, pieces, 1, tokens - single, 16).padded(room, 1)
        return None if shape is None else (shape.num_tokens, shape.num_pieces, shape.max_query_len)

    lengths = {1: 16, 16: 16, 17: 32, 100: 128, 2048: 2048}
    assert [padded(n) for n in lengths] == [(length, 1, length) for length in lengths.values()]
    assert padded(2049) is None
    assert padded(45, single=5, room=8) == (48, 1, 40)
    assert padded(46, single=5, room=8, pieces=3) == (64, 4, 56)
    assert padded(2048, single=5, room=8) is None
    assert padded(100, pieces=17) is None


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
    assert {shape.num_tokens for shape in captured_shapes(gpu)} == {16, 48, 64}


def test_prompts_beside_other_sequences(model: Path, cuda: Device) -> None:
    """Requests that come in twos while others decode: shapes come again, with padding of every kind."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 250, int(rng.integers(1, 40))).tolist() for _ in range(24)]
    params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    expected = LLM(model, device="cpu").generate(prompts, params)
    llm = LLM(model, device="cuda:0", max_num_seqs=12, max_num_batched_tokens=64, prefix_caching=False)
    assert arriving(llm._engine, prompts, params) == [done.token_ids for done in expected]
    captured = captured_shapes(llm)
    assert len(captured) >= 3
    assert {shape.num_pieces for shape in captured} >= {1, 2}
    assert max(shape.num_single for shape in captured) >= 8


def arriving(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """The outputs of prompts of which two come every other step."""
    waiting = [Request(str(number), prompt, params, streams=False) for number, prompt in enumerate(prompts)]
    found: dict[int, list[int]] = {}
    while waiting or engine.has_work:
        for request in waiting[:2]:
            engine.add(request)
        del waiting[:2]
        for delta in (*engine.step(), *engine.step()):
            assert delta.completion is not None
            found[int(delta.request_id)] = delta.completion.token_ids
    return [found[number] for number in range(len(prompts))]
