"""Outputs under load equal outputs alone, whatever the requests, the size of the cache, and who leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine_checks import check_idle
from kuiperllm import LLM, Completion, Device, SamplingParams
from kuiperllm.engine.core import Engine
from kuiperllm.engine.request import Request
from tiny_models import BASE, random_weights, write_checkpoint

NUM_REQUESTS = 64
SYSTEM = "You are a careful assistant who answers in few words. "

KINDS: list[dict[str, Any]] = [
    {},
    {"ignore_eos": True},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"logprobs": 2},
    {"min_tokens": 9, "stop_token_ids": tuple(range(0, 256, 3))},
    {"logit_bias": {65: 100.0, 66: 99.5}, "frequency_penalty": 1.0},
    {"temperature": 1.5, "seed": 5, "top_k": 40},
    {"temperature": 0.8, "seed": 2**63 + 7, "n": 3},
    {"n": 2, "best_of": 4, "temperature": 1.0, "seed": 1},
    {"prompt_logprobs": 1},
    {"presence_penalty": 0.4, "logprobs": 0, "top_p": 0.9, "temperature": 0.7, "seed": 9},
]
"""Greedy unless they say otherwise."""


class Odd:
    """A guide whose tokens are odd and even by turns."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def fill(self, bits: NDArray[np.int32]) -> None:
        bits[:] = np.array([0xAAAAAAAA, 0x55555555], np.uint32)[self.num_tokens % 2].view(np.int32)

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == 1 - self.num_tokens % 2
        self.num_tokens += 1

    @property
    def is_complete(self) -> bool:
        return self.num_tokens == 12


def requests() -> list[Request]:
    rng = random.Random(4)
    made = []
    for number in range(NUM_REQUESTS):
        kind = KINDS[number % len(KINDS)]
        text = "".join(chr(rng.randrange(97, 123)) for _ in range(rng.randrange(1, 60)))
        prompt = (SYSTEM if number % 3 == 0 else "") + text
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": rng.randrange(9, 90)} | kind)
        made.append(
            Request(
                str(number),
                list(prompt.encode()),
                params,
                priority=rng.choice([0, 0, 1]),
                make_guide=Odd if number % 13 == 5 else None,
                streams=bool(number % 2),
            )
        )
    return made


Facts = dict[tuple[str, int], tuple[Any, ...]]


def facts(completion: Completion) -> tuple[Any, ...]:
    """What must not depend on the load."""
    return completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason


def run(
    engine: Engine, arrivals: list[Request], at_once: int, between: Callable[[int], None] | None = None
) -> Facts:
    """Serve requests, a few more arriving at each step."""
    found: Facts = {}
    texts: dict[tuple[str, int], str] = {}
    waiting = list(arrivals)
    step = 0
    while waiting or engine.has_work:
        for request in waiting[:at_once]:
            engine.add(request)
        del waiting[:at_once]
        for delta in engine.step():
            assert delta.error is None
            key = delta.request_id, delta.index
            texts[key] = texts.get(key, "") + delta.text
            if delta.completion is not None:
                found[key] = facts(delta.completion)
                assert texts[key] == delta.completion.text
        if between is not None:
            between(step)
        step += 1
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("load"), BASE, random_weights(BASE))


@pytest.fixture(scope="module")
def alone(model: Path) -> Facts:
    """What each request gets from an engine that it has for itself."""
    engine = LLM(model, prefix_caching=False, device="cpu")._engine
    found: Facts = {}
    for request in requests():
        found |= run(engine, [request], 1)
    return found


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("at_once", [1, 64])
def test_under_load(model: Path, alone: Facts, prefix_caching: bool, at_once: int) -> None:
    options = {"prefix_caching": prefix_caching, "max_num_seqs": 16, "max_num_batched_tokens": 48}
    engine = LLM(model, device="cpu", **options)._engine
    assert run(engine, requests(), at_once) == alone
    hits = engine.stats().prefix_hits
    assert hits > 1000 if prefix_caching else 0 < hits < 1000  # the outputs of one request always share
    check_idle(engine)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_with_preemption(model: Path, alone: Facts, prefix_caching: bool) -> None:
    """A cache of 20 blocks of 16 tokens for 16 sequences of up to 8 blocks."""
    options = {"prefix_caching": prefix_caching, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    engine = LLM(model, device="cpu", block_size=16, kv_cache_tokens=320, **options)._engine
    assert run(engine, requests(), 5) == alone
    assert engine.stats().preemptions > 5
    check_idle(engine)


def test_with_users_who_leave(model: Path, alone: Facts) -> None:
    engine = LLM(model, device="cpu", block_size=16, kv_cache_tokens=512, max_num_seqs=12)._engine
    rng = random.Random(1)
    left = set(rng.sample(range(NUM_REQUESTS), 25))
    leaving = sorted(left)

    def leave(step: int) -> None:
        if leaving and step % 2:
            deltas = engine.abort(str(leaving.pop(0)))
            assert {delta.completion and delta.completion.finish_reason for delta in deltas} <= {"abort"}

    found = run(engine, requests(), 3, leave)
    stayed = {key: value for key, value in alone.items() if int(key[0]) not in left}
    assert {key: found.get(key) for key in stayed} == stayed
    for key in found.keys() - stayed.keys():  # those that had ended before they were given up
        assert found[key] == alone[key]
    assert engine.stats().finished["abort"] > 10
    check_idle(engine)


def test_on_an_emulated_gpu(model: Path, alone: Facts, cuda: Device) -> None:
    """One step is queued while the one before it is looked at; some sizes of batches are padded."""
    engine = LLM(model, device="cuda:0", block_size=16, kv_cache_tokens=512, max_num_seqs=12)._engine
    some = [request for request in requests() if int(request.request_id) % 2 == 0]
    found = run(engine, some, 4)
    assert found == {key: value for key, value in alone.items() if int(key[0]) % 2 == 0}
    assert engine.stats().preemptions > 0
    check_idle(engine)
