"""`LLM`: batches, streams, seeds, log probabilities, penalties; what it refuses; what it leaves behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuiperllm import (
    LLM,
    ContextLengthError,
    Device,
    ModelConfig,
    SamplingError,
    SamplingParams,
    TokenizerError,
    UsageError,
)
from kuiperllm.engine.core import Engine
from kuiperllm.engine.runner import Runner
from reference_llama import reference_logits
from tiny_models import BASE, BOS, Weights, random_weights, write_checkpoint, write_tokenizer

Idle = Callable[[LLM], None]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = ["a", "Once upon a time there was", "x" * 70, "b", "hello world", "c" * 33, "a"]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(BASE)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def truth(weights: Weights, ids: list[int]) -> np.ndarray:
    """Reference logits after each token, of the tokens that the tokenizer knows."""
    return reference_logits(ModelConfig.from_hf(BASE), weights, ids)[:, :260]


# --- batches and streams ----------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_the_reference(llm: LLM, weights: Weights) -> None:
    done = llm.generate(PROMPTS[1], GREEDY)[0]
    ids = done.prompt_token_ids + done.token_ids
    start = len(done.prompt_token_ids)
    assert done.token_ids == truth(weights, ids)[start - 1 : -1].argmax(-1).tolist()


def test_a_batch_gives_what_each_prompt_gives_alone(llm: LLM, assert_idle: Idle) -> None:
    alone = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    together = llm.generate(PROMPTS, GREEDY)
    assert [done.token_ids for done in together] == alone
    assert [done.prompt_token_ids for done in together] == [llm.tokenizer.encode(p) for p in PROMPTS]
    assert_idle(llm)


def test_ids_and_text_may_be_mixed(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    expected = llm.generate("hello", GREEDY)[0].token_ids
    for prompt in (ids, tuple(ids), np.array(ids), [ids], [np.array(ids, np.int32)], ["hello"]):
        assert [done.token_ids for done in llm.generate(prompt, GREEDY)] == [expected]
    assert [done.token_ids for done in llm.generate([ids, "hello"], GREEDY)] == [expected, expected]
    assert llm.generate([], GREEDY) == []


def test_stream_gives_what_generate_gives(llm: LLM, assert_idle: Idle) -> None:
    params = SamplingParams(seed=3, max_tokens=30, logprobs=2)
    expected = llm.generate("stream", params)[0]
    chunks = list(llm.stream("stream", params))
    assert [chunk.token_id for chunk in chunks] == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert [chunk.logprobs for chunk in chunks] == expected.logprobs
    assert [chunk.completion is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    done = chunks[-1].completion
    assert done is not None
    assert (done.token_ids, done.text, done.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )
    assert done.time_to_first_token_s > 0
    assert done.decode_tokens_per_s > 0
    assert_idle(llm)


def test_closing_a_stream_early_frees_everything(llm: LLM, assert_idle: Idle) -> None:
    stream = llm.stream("x" * 60, GREEDY)
    for _ in range(5):
        next(stream)
    assert llm._engine.pool.num_free < llm._engine.pool.max_blocks
    stream.close()
    assert_idle(llm)
    for _ in llm.stream("y", GREEDY):
        break
    assert_idle(llm)
    llm.stream("never begun", GREEDY)
    assert_idle(llm)


def test_a_cache_that_grows_gives_what_a_large_one_gives(random_model: Path) -> None:
    small = LLM(random_model, block_size=16)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    prompts = ["grow", "up", "along", "with", "me"]
    grown = small.generate(prompts, params)
    assert {len(done.prompt_token_ids) + len(done.token_ids) for done in grown} == {256}
    assert small._engine.pool.num_blocks == 128  # doubled three times, for 5 x 16
    large = LLM(random_model, block_size=16)
    large._engine.pool.release(large._engine.pool.allocate(large._engine.pool.max_blocks))
    assert large._engine.pool.num_blocks == large._engine.pool.max_blocks
    assert [d.token_ids for d in large.generate(prompts, params)] == [d.token_ids for d in grown]


# --- choosing tokens --------------------------------------------------------------------------------------


def test_seeds_reproduce_in_any_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, seed=11, max_tokens=20, ignore_eos=True)
    alone = llm.generate("dice", params)[0].token_ids
    assert llm.generate("dice", params)[0].token_ids == alone
    assert llm.generate(["other", "dice", "x" * 40], params)[1].token_ids == alone
    for seed in (12, 2**63, 2**64 - 1):
        other = SamplingParams(temperature=2.0, seed=seed, max_tokens=20, ignore_eos=True)
        assert llm.generate("dice", other)[0].token_ids != alone


def test_without_a_seed_texts_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=20)
    first, second = llm.generate(["dice", "dice"], params)
    assert first.token_ids != second.token_ids


def test_nearly_even_odds_give_every_token_but_those_that_the_tokenizer_lacks(llm: LLM) -> None:
    assert (llm.tokenizer.vocab_size, llm.config.vocab_size) == (260, 261)
    params = SamplingParams(temperature=100.0, seed=1, max_tokens=150, ignore_eos=True)
    for done in llm.generate(["a", "b", "c"], params):
        assert max(done.token_ids) < 260
        assert len(set(done.token_ids)) > 80  # even odds: 114 on the average


@pytest.mark.parametrize("penalties", [{}, {"presence_penalty": 1.5, "min_tokens": 5}])
def test_log_probabilities(llm: LLM, weights: Weights, penalties: dict[str, float]) -> None:
    """They are the model's own, whatever penalties, temperature and the like make of them."""
    params = SamplingParams(temperature=0.9, top_k=40, seed=5, max_tokens=12, logprobs=4, **penalties)
    for done in llm.generate(["likely", "or not"], params):
        assert done.logprobs is not None
        assert len(done.logprobs) == len(done.token_ids)
        ids = done.prompt_token_ids + done.token_ids
        rows = truth(weights, ids)[len(done.prompt_token_ids) - 1 :]
        for entry, token_id, row in zip(done.logprobs, done.token_ids, rows, strict=False):
            expected = log_softmax(row)
            assert entry.token_id == token_id
            assert entry.logprob == pytest.approx(expected[token_id], abs=5e-4)
            assert [i for i, _ in entry.top] == np.argsort(-expected)[:4].tolist()
            assert [p for _, p in entry.top] == pytest.approx(np.sort(expected)[:-5:-1], abs=5e-4)


def test_logprobs_0_reports_the_chosen_token_alone(llm: LLM) -> None:
    done = llm.generate("a", SamplingParams(temperature=0.0, max_tokens=2, logprobs=0))[0]
    assert done.logprobs is not None
    assert [entry.top for entry in done.logprobs] == [(), ()]


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 0.7, "presence_penalty": -1.0, "frequency_penalty": 0.3},
    ],
)
def test_penalties(llm: LLM, weights: Weights, penalties: dict[str, float]) -> None:
    """Against the definitions: repetition counts the prompt, presence and frequency the output only."""
    repetition = penalties.get("repetition_penalty", 1.0)
    presence, frequency = penalties.get("presence_penalty", 0.0), penalties.get("frequency_penalty", 0.0)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, **penalties)
    plain = llm.generate("aab", GREEDY)[0].token_ids
    done = llm.generate(["other", "aab"], params)[1]
    assert done.token_ids[: len(plain)] != plain
    prompt = done.prompt_token_ids
    rows = truth(weights, prompt + done.token_ids)[len(prompt) - 1 : -1]
    for step, row in enumerate(rows):
        output = done.token_ids[:step]
        scores = row.astype(np.float64).copy()
        for token_id in {*prompt, *output}:
            value = scores[token_id]
            value = value / repetition if value > 0 else value * repetition
            count = output.count(token_id)
            scores[token_id] = value - (presence + count * frequency if count else 0)
        assert done.token_ids[step] == int(scores.argmax())


def test_default_params_are_the_checkpoints(random_model: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, BASE, random_weights(BASE))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7, "eos_token_id": [65]}')
    llm = LLM(tmp_path)
    assert llm.default_params == SamplingParams(temperature=0.5, top_k=7)
    assert llm.loaded.stop_ids >= {65, 257}
    assert LLM(random_model).default_params == SamplingParams()


# --- what it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [256, 300])
def test_a_prompt_that_is_too_long(llm: LLM, length: int) -> None:
    with pytest.raises(ContextLengthError, match=rf"{length} tokens.*context of 256"):
        llm.generate([[1] * length], GREEDY)
    with pytest.raises(ContextLengthError):
        llm.stream([1] * length, GREEDY)  # at once, not with the first token


@pytest.mark.parametrize("token_id", [-1, 261, 10**12])
def test_a_token_id_out_of_range(llm: LLM, token_id: int, assert_idle: Idle) -> None:
    with pytest.raises(TokenizerError, match=rf"{token_id} is outside .* 261"):
        llm.generate(["fine", [1, token_id]], GREEDY)
    assert_idle(llm)


@pytest.mark.parametrize("prompt", [[[1.5]], [["a", "b"]], [None], [{"role": "user"}]])
def test_what_is_no_prompt(llm: LLM, prompt: Any) -> None:
    with pytest.raises(UsageError, match="a text or a list of token ids"):
        llm.generate(prompt, GREEDY)


def test_an_empty_prompt(llm: LLM, random_model: Path, tmp_path: Path) -> None:
    assert llm.generate("", GREEDY)[0].prompt_token_ids == [BOS]
    with pytest.raises(UsageError, match="prompt is empty"):
        llm.generate([[]], GREEDY)
    write_tokenizer(tmp_path, bos=False)
    without = LLM(random_model, tokenizer=tmp_path)
    with pytest.raises(UsageError, match="prompt is empty"):
        without.generate("", GREEDY)


def test_unknown_and_impossible_options(random_model: Path) -> None:
    with pytest.raises(UsageError, match=r"no option 'max_len'; there are device, dtype, .*max_model_len"):
        LLM(random_model, max_len=3)
    with pytest.raises(UsageError, match="max_model_len"):
        LLM(random_model, max_model_len=0)
    with pytest.raises(UsageError, match="max_model_len"):
        LLM(random_model, max_model_len="100")
    with pytest.raises(UsageError, match="dtype 'int4' is unknown"):
        LLM(random_model, dtype="int4")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", float("nan")),
        ("top_k", 1.5),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3),
        ("frequency_penalty", float("inf")),
        ("seed", 2**64),
        ("seed", "x"),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("min_tokens", None),
        ("logprobs", 101),
        ("stop", 5),
        ("stop", ("",)),
        ("stop_token_ids", ("a",)),
        ("stop_token_ids", 5),
    ],
)
def test_impossible_sampling_parameters(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=rf"^{name}=.* is not possible; allowed: "):
        SamplingParams(**{name: value})


def test_only_one_generation_at_a_time(llm: LLM, assert_idle: Idle) -> None:
    stream = llm.stream("first", GREEDY)
    next(stream)
    with pytest.raises(UsageError, match="already generating"):
        llm.generate("second", GREEDY)
    caught: list[Exception] = []

    def second() -> None:
        try:
            llm.generate("second", GREEDY)
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert "already generating" in str(caught[0])
    assert len(list(stream)) == 19  # the first is none the worse
    assert_idle(llm)
    llm.generate("third", GREEDY)


def test_two_models_in_two_threads(random_model: Path, tmp_path: Path) -> None:
    """Each thread captures decode steps of its own while the other computes."""
    config = BASE | {"model_type": "qwen3", "num_hidden_layers": 3}
    write_checkpoint(tmp_path, config, random_weights(config, seed=1))
    models = [LLM(random_model, block_size=16), LLM(tmp_path, block_size=16)]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=100)
    expected = [[d.token_ids for d in model.generate(PROMPTS, params)] for model in models]
    found: list[list[list[int]]] = [[], []]

    def work(index: int) -> None:
        for _ in range(3):  # new models: caches grow and steps are captured again
            model = LLM((random_model, tmp_path)[index], block_size=16)
            found[index] = [done.token_ids for done in model.generate(PROMPTS, params)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# --- what it leaves behind --------------------------------------------------------------------------------


def test_a_deleted_model_gives_all_memory_back(random_model: Path) -> None:
    gc.collect()
    threads = set(threading.enumerate())
    before = Device("cpu").allocator.stats().allocated_bytes
    llm = LLM(random_model)
    llm.generate(PROMPTS, GREEDY)
    assert Device("cpu").allocator.stats().allocated_bytes > before
    gone = weakref.ref(llm._engine.runner)
    gc.disable()  # reference counts alone must do
    try:
        del llm
        assert gone() is None
        assert Device("cpu").allocator.stats().allocated_bytes == before
    finally:
        gc.enable()
    new = set(threading.enumerate()) - threads
    assert all(thread.name.startswith("kuiper-") for thread in new)  # the process's own team


@pytest.mark.parametrize("step", [1, 2, 5])
def test_an_interrupt_leaves_the_model_usable(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, assert_idle: Idle, step: int
) -> None:
    llm = LLM(random_model, max_num_batched_tokens=16)
    expected = [done.token_ids for done in llm.generate(PROMPTS, GREEDY)]
    launch, calls = Runner.launch, iter(range(1000))

    def interrupted(self: Runner, *arguments: Any, **options: Any) -> Any:
        result = launch(self, *arguments, **options)
        if next(calls) == step:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert_idle(llm)
    assert [done.token_ids for done in llm.generate(PROMPTS, GREEDY)] == expected


def test_an_interrupt_while_it_tidies_up_leaves_the_model_usable(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, assert_idle: Idle
) -> None:
    llm = LLM(random_model)
    expected = llm.generate("a", GREEDY)[0].token_ids
    stream = llm.stream("x" * 60, GREEDY)
    next(stream)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "abort", interrupted)
        patch.setattr(Engine, "reset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.close()
    assert llm._engine.pool.num_free < llm._engine.pool.max_blocks
    assert llm.generate("a", GREEDY)[0].token_ids == expected
    assert_idle(llm)
