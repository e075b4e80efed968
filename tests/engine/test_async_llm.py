"""`AsyncLLM`: many requests at once, readers who are slow or leave, failures of one and of all."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine_checks import check_idle
from kuiperllm import LLM, ContextLengthError, Device, KuiperError, SamplingParams, UsageError
from kuiperllm.engine.async_llm import AsyncLLM
from kuiperllm.engine.output import Completion, Delta
from kuiperllm.engine.runner import Runner
from kuiperllm.errors import EngineStoppedError, QueueFullError

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
PROMPTS = ["a", "Once upon a time", "x" * 70, "b", "hello world", "c" * 33]

Body = Callable[[AsyncLLM], Awaitable[Any]]


def run(model: Path, body: Body, *, is_idle: bool = True, **options: Any) -> Any:
    """What `body` returns; afterwards no block is in use, and the thread has ended."""

    async def main() -> Any:
        async with AsyncLLM(model, device="cpu", warm_up=False, **options) as llm:
            result = await body(llm)
            if is_idle:
                assert await llm.drain(10)
                check_idle(llm._engine)
                assert llm._mailboxes == {}
        return result

    threads = set(threading.enumerate())
    result = asyncio.run(main())
    assert not [t for t in set(threading.enumerate()) - threads if t.name == "kuiper-engine"]
    return result


async def text_of(deltas: Any) -> str:
    return "".join([delta.text async for delta in deltas])


def test_it_gives_what_llm_gives(random_model: Path) -> None:
    expected = LLM(random_model, device="cpu").generate(PROMPTS, GREEDY)

    async def body(llm: AsyncLLM) -> None:
        streams = await asyncio.gather(*(text_of(llm.generate(prompt, GREEDY)) for prompt in PROMPTS))
        whole = await asyncio.gather(*(llm.complete(prompt, GREEDY) for prompt in PROMPTS))
        assert streams == [done.text for done in expected]
        assert [[(d.text, d.token_ids) for d in each] for each in whole] == [
            [(done.text, done.token_ids)] for done in expected
        ]
        stats = llm.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert stats.generated_tokens == 20 * 12
        assert stats.prompt_tokens == 2 * sum(len(done.prompt_token_ids) for done in expected)
        assert stats.finished == {"stop": 0, "length": 12, "abort": 0, "error": 0}
        assert 0 < stats.prefix_hits < stats.prefix_queries
        assert stats.kv_blocks > 0
        assert stats.kv_usage == 0

    run(random_model, body)


def test_a_slow_reader_gets_fewer_and_longer_deltas(random_model: Path) -> None:
    params = GREEDY.with_changes(logprobs=1, prompt_logprobs=0)
    expected = LLM(random_model, device="cpu").generate("slow", params)[0]

    async def body(llm: AsyncLLM) -> None:
        deltas: list[Delta] = []
        async for delta in llm.generate("slow", params):
            deltas.append(delta)
            await asyncio.sleep(0.1 if len(deltas) == 1 else 0)
        assert len(deltas) < 20
        assert [token for delta in deltas for token in delta.token_ids] == expected.token_ids
        assert [entry for delta in deltas for entry in delta.logprobs or ()] == expected.logprobs
        assert "".join(delta.text for delta in deltas) == expected.text
        assert deltas[0].prompt_logprobs == expected.prompt_logprobs
        assert [delta.prompt_logprobs for delta in deltas[1:]] == [None] * (len(deltas) - 1)
        done = deltas[-1].completion
        assert done is not None
        assert (done.text, done.token_ids) == (expected.text, expected.token_ids)
        assert 0 < done.queue_s < done.time_to_first_token_s < done.total_s

    run(random_model, body)


def test_several_outputs(random_model: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)

    async def body(llm: AsyncLLM) -> None:
        three = await llm.complete("dice", params.with_changes(n=3))
        assert [done.index for done in three] == [0, 1, 2]
        alone = [await llm.complete("dice", params.with_changes(seed=3 + i)) for i in range(5)]
        assert [done.token_ids for done in three] == [done.token_ids for (done,) in alone[:3]]
        streamed: dict[int, str] = {}
        async for delta in llm.generate("dice", params.with_changes(n=3)):
            streamed[delta.index] = streamed.get(delta.index, "") + delta.text
        assert streamed == {done.index: done.text for done in three}
        best = await llm.complete("dice", params.with_changes(n=2, best_of=5))
        scores = {}
        for index in range(5):
            (done,) = await llm.complete("dice", params.with_changes(seed=3 + index, logprobs=0))
            scores[tuple(done.token_ids)] = np.mean([entry.logprob for entry in done.logprobs or ()])
        ranked = sorted(scores, key=lambda tokens: scores[tokens], reverse=True)
        assert [(done.index, tuple(done.token_ids)) for done in best] == [(0, ranked[0]), (1, ranked[1])]
        assert [done.mean_logprob for done in best] == pytest.approx([scores[r] for r in ranked[:2]])
        assert [done.logprobs for done in best] == [None, None]

    run(random_model, body)


def test_readers_who_leave(random_model: Path) -> None:
    """By cancelling, closing, breaking off, or never beginning to read, at any time."""

    async def leave(llm: AsyncLLM, number: int) -> None:
        rng = random.Random(number)
        params = LONG.with_changes(n=rng.choice([1, 1, 3]))
        deltas = llm.generate("x" * rng.randrange(1, 50) + str(number), params)
        if number % 4 == 0:
            return
        if number % 4 == 1:
            task = asyncio.create_task(text_of(deltas))
            await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
            with suppress(asyncio.CancelledError):  # unless it was done
                await task
            return
        async for delta in deltas:
            if len(delta.token_ids) + rng.random() * 20 > 19:
                break
        if number % 4 == 2:
            await deltas.aclose()
            assert [delta async for delta in deltas] == []

    async def body(llm: AsyncLLM) -> None:
        staying = asyncio.create_task(llm.complete("staying", LONG))
        await asyncio.gather(*(leave(llm, number) for number in range(40)))
        assert len((await staying)[0].token_ids) == 200
        gc.collect()

    run(random_model, body, max_num_seqs=6, kv_cache_tokens=512)


def test_giving_up_by_name(random_model: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        deltas = llm.generate("named", LONG.with_changes(n=2), request_id="mine")
        with pytest.raises(UsageError, match="the request id 'mine' is in use"):
            llm.generate("other", LONG, request_id="mine")
        last: dict[int, Completion] = {}
        async for delta in deltas:
            llm.abort("mine")
            if delta.completion is not None:
                last[delta.index] = delta.completion
        assert [done.finish_reason for done in last.values()] == ["abort", "abort"]
        assert all(0 < len(done.token_ids) < 200 for done in last.values())
        llm.abort("mine")
        llm.abort("nobody")
        assert len(await llm.complete("again", GREEDY, request_id="mine")) == 1

    run(random_model, body)


def test_what_is_wrong_with_a_request_is_said_at_once(random_model: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        with pytest.raises(ContextLengthError, match=r"256 tokens.*context of 256"):
            llm.generate([1] * 256, GREEDY)
        with pytest.raises(UsageError, match="prompt is empty"):
            llm.generate([], GREEDY)
        with pytest.raises(KuiperError, match="outside the model's vocabulary"):
            llm.generate([9999], GREEDY)
        assert await text_of(llm.generate("fine", GREEDY))

    run(random_model, body)


def test_a_full_queue(random_model: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        running = llm.generate("first", LONG)
        await anext(running)
        waiting = [llm.generate(f"{number}", LONG) for number in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            llm.generate("one too many", LONG)
        await asyncio.gather(*(text_of(deltas) for deltas in (running, *waiting)))
        await llm.complete("now", GREEDY)

    run(random_model, body, max_num_seqs=1, max_waiting=2)


def test_urgent_requests_go_first(random_model: Path) -> None:
    async def body(llm: AsyncLLM) -> list[str]:
        ended: list[str] = []

        async def one(name: str, priority: int) -> None:
            await llm.complete(name, GREEDY, priority=priority)
            ended.append(name)

        await asyncio.gather(
            *(one(name, priority) for name, priority in zip("abcd", (0, 2, 1, -1), strict=True))
        )
        return ended

    assert run(random_model, body, max_num_seqs=1)[1:] == ["a", "c", "b"][-3:]


# --- guides -----------------------------------------------------------------------------------------------


class Letters:
    """Only certain bytes, so many of them."""

    def __init__(self, letters: bytes, count: int, fails_at: str = "") -> None:
        self.letters, self.left, self.fails_at = letters, count, fails_at

    def fill(self, bits: NDArray[np.int32]) -> None:
        if self.fails_at == "fill":
            raise ValueError("no way on")
        bits[:] = 0
        for letter in self.letters:
            bits[letter // 32] |= np.int32(1 << letter % 32) if letter % 32 < 31 else np.int32(-(2**31))

    def accept(self, token_id: int) -> None:
        assert token_id in self.letters
        if self.fails_at == "accept":
            raise ValueError("no way on")
        self.left -= 1

    @property
    def is_complete(self) -> bool:
        return self.left == 0


def test_guides(random_model: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=50, seed=1, n=2)

    async def body(llm: AsyncLLM) -> None:
        tasks = [
            llm.complete("go", params, make_guide=lambda word=word: Letters(word, 7))
            for word in (b"ab", b"xyz_?")
        ]
        first, second = await asyncio.gather(*tasks)
        for done, letters in (*[(d, "ab") for d in first], *[(d, "xyz_?") for d in second]):
            assert (len(done.text), set(done.text) <= set(letters), done.finish_reason) == (7, True, "stop")

    run(random_model, body)


@pytest.mark.parametrize("where", ["fill", "accept", "make"])
def test_a_guide_that_fails_ends_its_request_alone(random_model: Path, where: str) -> None:
    def make() -> Letters:
        if where == "make":
            raise ValueError("no way on")
        return Letters(b"ab", 9, where)

    async def body(llm: AsyncLLM) -> None:
        others = [asyncio.create_task(text_of(llm.generate(f"{i}", GREEDY))) for i in range(3)]
        for _ in range(3):
            with pytest.raises(KuiperError, match="ValueError: no way on"):
                await llm.complete("bad", GREEDY.with_changes(n=2), make_guide=make)
        assert all(await asyncio.gather(*others))
        assert llm.failure is None
        assert llm.stats().finished["error"] == (0 if where == "make" else 6)

    run(random_model, body)


# --- the end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("a fuse blew"), MemoryError()])
def test_a_failing_engine_tells_everybody(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    launch, calls = Runner.launch, iter(range(1000))

    def failing(self: Runner, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 8:
            raise error
        return launch(self, *arguments, **options)

    monkeypatch.setattr(Runner, "launch", failing)

    async def body(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(text_of(llm.generate(f"{number}", LONG))) for number in range(12)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in found} == {EngineStoppedError}
        assert "the engine failed and has stopped: " in str(found[0])
        assert llm.failure is error
        assert not llm.is_running
        with pytest.raises(EngineStoppedError, match="failed"):
            llm.generate("too late", LONG)
        assert await llm.drain(0)

    run(random_model, body, is_idle=False)
    assert "the engine failed" in caplog.text


def test_draining(random_model: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        task = asyncio.create_task(llm.complete("under way", LONG))
        await asyncio.sleep(0)
        assert not await llm.drain(0.001)
        with pytest.raises(EngineStoppedError, match="shutting down"):
            llm.generate("too late", GREEDY)
        assert not llm.is_running
        assert await llm.drain()
        assert len((await task)[0].token_ids) == 200

    run(random_model, body)


def test_shutting_down_gives_up_what_is_under_way(random_model: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        task = asyncio.create_task(text_of(llm.generate("under way", LONG)))
        await asyncio.sleep(0.01)
        await llm.shutdown()
        with pytest.raises(EngineStoppedError, match="shut down before"):
            await task
        await llm.shutdown()
        check_idle(llm._engine)

    run(random_model, body, is_idle=False)


def test_a_loop_that_is_gone(random_model: Path) -> None:
    """Nobody is told any more, and nothing is printed."""
    made: list[AsyncLLM] = []

    async def main() -> None:
        made.append(AsyncLLM(random_model, device="cpu", warm_up=False))
        made[0]._kept = made[0].generate("on and on", LONG)  # type: ignore[attr-defined]

    asyncio.run(main())
    made[0]._thread.join()
    assert made[0].failure is None
    check_idle(made[0]._engine)


# --- what else is reported --------------------------------------------------------------------------------


def test_embeddings(random_model: Path) -> None:
    """The output projection makes of them the logits that the next token is chosen from."""
    llm = LLM(random_model, device="cpu")
    prompts = ["embed", "me" * 40, "embed me as well"]

    async def body(llm: AsyncLLM) -> list[Completion]:
        mixed = asyncio.create_task(llm.complete("text beside it", GREEDY))
        found = await asyncio.gather(*(llm.embed(prompt) for prompt in prompts))
        await mixed
        return list(found)

    found = run(random_model, body, max_num_batched_tokens=30)
    from safetensors.numpy import load_file

    lm_head = load_file(random_model / "model.safetensors")["lm_head.weight"]
    for prompt, done in zip(prompts, found, strict=True):
        assert done.embedding is not None
        assert (done.embedding.dtype, done.embedding.shape) == (np.float32, (64,))
        assert (done.token_ids, done.text, done.finish_reason) == ([], "", "stop")
        ids = llm.token_ids(prompt)
        with llm.scorer() as scorer:
            ((_, logits),) = list(scorer.logits([*ids, 0], len(ids)))
            assert lm_head @ done.embedding == pytest.approx(logits.numpy()[0], abs=1e-4)


def test_log_probabilities_of_the_prompt(random_model: Path) -> None:
    """In pieces, and beside others; they are those of the scorer over the tokens that the tokenizer knows."""
    llm = LLM(random_model, device="cpu", max_num_batched_tokens=16)
    llm._engine.runner.vocab_size = llm._engine.runner.passes._vocab_size = 261
    params = SamplingParams(max_tokens=2, prompt_logprobs=3, temperature=0.0)
    prompts = ["a text that is taken in in pieces", "b", "a text that is taken in in other pieces"]
    for done in llm.generate(prompts, params):
        assert done.prompt_logprobs is not None
        assert done.prompt_logprobs[0] is None
        rest = [entry for entry in done.prompt_logprobs if entry is not None]
        assert [entry.token_id for entry in rest] == done.prompt_token_ids[1:]
        assert [len(entry.top) for entry in rest] == [3] * len(rest)
        with llm.scorer() as scorer:
            expected = scorer.logprobs(done.prompt_token_ids) if rest else []
        assert [entry.logprob for entry in rest] == pytest.approx(list(expected), abs=1e-4)
        assert all(entry.top[0][1] >= entry.logprob - 1e-6 for entry in rest)


def test_on_an_emulated_gpu(random_model: Path, cuda: Device) -> None:
    """Warmed up: nothing is captured for a request."""
    expected = LLM(random_model, device="cpu").generate(PROMPTS, GREEDY)

    async def main() -> None:
        options: dict[str, Any] = {"max_num_seqs": 9, "max_model_len": 128, "max_num_batched_tokens": 64}
        async with AsyncLLM(random_model, device="cuda:0", **options) as llm:
            states = llm._engine.runner.passes._states
            assert sorted(size for size, _ in states) == [*range(1, 9), 16]
            graphs = {key: dict(state._graphs) for key, state in states.items()}
            found = await asyncio.gather(*(text_of(llm.generate(prompt, GREEDY)) for prompt in PROMPTS))
            assert found == [done.text for done in expected]
            assert {key: dict(state._graphs) for key, state in states.items()} == graphs

    asyncio.run(main())
