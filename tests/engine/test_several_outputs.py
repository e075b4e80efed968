"""`LLM`: several outputs of a prompt, biases, and what is kept from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kuiperllm import (
    LLM,
    SamplingError,
    SamplingParams,
    UsageError,
)
from tiny_models import BASE, Weights, random_weights

Idle = Callable[[LLM], None]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = ["a", "Once upon a time there was", "x" * 70, "b", "hello world", "c" * 33, "a"]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(BASE)


def test_several_outputs_of_a_prompt(llm: LLM, assert_idle: Idle) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=10, ignore_eos=True, n=2)
    found = llm.generate(["dice", "cards"], params)
    alone = [
        llm.generate(prompt, params.with_changes(n=1, seed=seed))[0]
        for prompt in ("dice", "cards")
        for seed in (7, 8)
    ]
    assert [done.token_ids for done in found] == [done.token_ids for done in alone]
    assert [done.index for done in found] == [0, 1, 0, 1]
    with pytest.raises(UsageError, match="a stream is of one output"):
        llm.stream("dice", params)
    assert_idle(llm)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_beginning_of_a_prompt_is_computed_once(random_model: Path, prefix_caching: bool) -> None:
    llm = LLM(random_model, block_size=16, prefix_caching=prefix_caching)
    first = llm.generate("x" * 70, GREEDY)[0]
    again = llm.generate([*first.prompt_token_ids, *first.token_ids, 65, 66], GREEDY)[0]
    fresh = LLM(random_model).generate([again.prompt_token_ids], GREEDY)[0]
    assert again.num_cached_tokens == (80 if prefix_caching else 0)  # 71 + 20 tokens, the last one not put in
    assert again.token_ids == fresh.token_ids


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({1: 101}, "logit_bias=.*-100 to 100"),
        ({-1: 1}, "logit_bias=.*token ids"),
        ({"a": 1}, "logit_bias=.*token ids"),
        ({1: "a"}, "logit_bias=.*numbers"),
        (5, "logit_bias=5"),
    ],
)
def test_impossible_biases(bias: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        SamplingParams(logit_bias=bias)


def test_biases(llm: LLM) -> None:
    forced = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={ord("z"): 100})
    assert llm.generate("a", forced)[0].text == "zzzz"
    usual = llm.generate("a", GREEDY)[0].token_ids[0]
    banned = llm.generate("a", GREEDY.with_changes(logit_bias={usual: -100}))[0]
    assert usual not in banned.token_ids
    assert SamplingParams(logit_bias={5: 1, 2: -0.5}).bias_pairs == ((2, -0.5), (5, 1))
