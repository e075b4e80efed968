"""Logits and log probabilities of every token of a text, perplexity: against the NumPy decoder in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kuiperllm import (
    LLM,
    CheckpointError,
    ContextLengthError,
    Device,
    ModelConfig,
    SamplingParams,
    TokenizerError,
    UsageError,
)
from kuiperllm.engine import scoring
from reference_llama import mean_nll, reference_logits
from tiny_models import BASE, BOS, Weights, random_weights, write_checkpoint, write_tokenizer

Idle = Callable[[LLM], None]
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(150))


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(BASE)


def true_logprobs(weights: Weights, ids: list[int]) -> np.ndarray:
    """Of each token but the first, in float64 and of all rows of the vocabulary."""
    logits = reference_logits(ModelConfig.from_hf(BASE), weights, ids, dtype=np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logs[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("first", [1, 2, 30, 69])
def test_log_probabilities_of_all_tokens(
    llm: LLM, weights: Weights, monkeypatch: pytest.MonkeyPatch, assert_idle: Idle, first: int
) -> None:
    """Prompts are taken in 24 tokens at a time here, and logits kept for 7 places at a time."""
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 7 * 261 * 4 + 3)
    ids = llm.token_ids(TEXT[:69])
    with llm.scorer() as scorer:
        found = scorer.logprobs(ids, first)
        sizes = [(place, logits.shape) for place, logits in scorer.logits(ids, first)]
    assert found.dtype == np.float64
    assert np.abs(found - true_logprobs(weights, ids)[first - 1 :]).max() < 1e-4
    assert all(rows <= 7 and columns == 261 for _, (rows, columns) in sizes)
    assert [place for place, _ in sizes] == np.cumsum([first, *(rows for _, (rows, _) in sizes)])[
        :-1
    ].tolist()
    assert sum(rows for _, (rows, _) in sizes) == len(ids) - first
    assert_idle(llm)


def test_on_each_device(random_model: Path, weights: Weights, any_device: Device) -> None:
    llm = LLM(random_model, device=str(any_device), max_num_batched_tokens=16)
    ids = llm.token_ids(TEXT[:40])
    with llm.scorer() as scorer:
        found = scorer.logprobs(ids, 5)
    assert np.abs(found - true_logprobs(weights, ids)[4:]).max() < 1e-4


def test_the_log_probabilities_are_those_of_generation(random_model: Path) -> None:
    """`generate` leaves out the row that the tokenizer has no token for; here it has one for each."""
    llm = LLM(random_model)
    llm._engine.runner.vocab_size = llm._engine.runner.passes._vocab_size = 261
    done = llm.generate("ab", SamplingParams(max_tokens=12, seed=3, logprobs=0, ignore_eos=True))[0]
    assert done.logprobs is not None
    with llm.scorer() as scorer:
        found = scorer.logprobs(done.prompt_token_ids + done.token_ids, len(done.prompt_token_ids))
    assert found == pytest.approx([entry.logprob for entry in done.logprobs], abs=1e-4)


def test_perplexity_of_windows(llm: LLM, weights: Weights, assert_idle: Idle) -> None:
    told: list[tuple[int, int, float]] = []
    found = llm.perplexity(TEXT, context=32, progress=lambda *facts: told.append(facts))
    ids = [BOS, *TEXT.encode()]
    nll = np.concatenate(
        [-true_logprobs(weights, [BOS, *ids[i + 1 : i + 32]])[16:] for i in range(0, 128, 32)]
    )
    assert found.num_scored == len(nll) == 4 * 15
    assert found.mean_nll == pytest.approx(nll.mean(), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    by_hand = math.sqrt((np.mean(nll**2) - np.mean(nll) ** 2) / (len(nll) - 1)) * math.exp(nll.mean())
    assert found.standard_error == pytest.approx(by_hand, rel=1e-4)
    assert (found.num_windows, found.context, found.stride, found.num_tokens) == (4, 32, None, 128)
    assert found.seconds > 0
    assert found.tokens_per_s > 0
    assert [facts[:2] for facts in told] == [(32, 128), (64, 128), (96, 128), (128, 128)]
    assert told[1][2] == pytest.approx(math.exp(nll[:30].mean()), rel=1e-5)
    assert told[-1][2] == pytest.approx(found.perplexity)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert llm.perplexity(TEXT, context=32, max_windows=2).mean_nll == pytest.approx(
        nll[:30].mean(), abs=1e-5
    )
    assert llm.perplexity([BOS, *TEXT.encode()], context=32).mean_nll == found.mean_nll
    assert_idle(llm)


def test_perplexity_of_sliding_windows(llm: LLM, weights: Weights) -> None:
    found = llm.perplexity(TEXT, context=40, stride=20)
    ids = [BOS, *TEXT.encode()]
    starts = range(0, len(ids) - 50, 20)
    nll = np.concatenate([-true_logprobs(weights, ids[i : i + 50])[29:] for i in starts])
    assert found.num_windows == len(starts)
    assert found.num_scored == len(nll) == 20 * len(starts)
    assert found.mean_nll == pytest.approx(nll.mean(), abs=1e-5)


def test_several_texts_are_scored_whole(llm: LLM, weights: Weights) -> None:
    texts = ["hello", TEXT[:50], "x"]
    nll = np.concatenate([-true_logprobs(weights, [BOS, *text.encode()]) for text in texts])
    found = llm.perplexity(texts)
    assert (found.num_windows, found.num_scored, found.context) == (3, 56, None)
    assert found.mean_nll == pytest.approx(nll.mean(), abs=1e-5)
    assert llm.perplexity([[BOS, *b"hello"]]).num_scored == 5


def test_context_that_is_not_given_is_what_the_model_allows(llm: LLM) -> None:
    text = "ab" * 300
    assert llm.perplexity(text).context == 256
    assert llm.perplexity(text, stride=30).context == 256 - 15


def test_a_tokenizer_that_adds_nothing(tmp_path: Path, weights: Weights) -> None:
    write_checkpoint(tmp_path, BASE, weights)
    write_tokenizer(tmp_path, bos=False)
    found = LLM(tmp_path).perplexity(TEXT, context=50)
    ids = list(TEXT.encode())
    nll = np.concatenate([-true_logprobs(weights, ids[i : i + 50])[25:] for i in (0, 50, 100)])
    assert found.mean_nll == pytest.approx(nll.mean(), abs=1e-5)


def test_one_token_has_no_standard_error(llm: LLM) -> None:
    found = llm.perplexity(["a"])
    assert math.isnan(found.standard_error)
    assert found.to_dict()["standard_error"] is None


@pytest.mark.parametrize(
    ("error", "words", "text", "options"),
    [
        (UsageError, "windows of 100 need 200 or more; .* at most 75", TEXT, {"context": 100}),
        (UsageError, "3 tokens, and windows of 256 need 512 or more; use a longer text$", "ab", {}),
        (UsageError, "at least 4 tokens, not 3", TEXT, {"context": 3}),
        (UsageError, "stride 0 is not possible", TEXT, {"stride": 0}),
        (UsageError, "stride 33 is not possible", TEXT, {"context": 32, "stride": 33}),
        (UsageError, "at least 1, not 0", TEXT, {"max_windows": 0}),
        (UsageError, "several texts are scored whole", ["a", "b"], {"context": 32}),
        (UsageError, "no token to score", [], {}),
        (UsageError, "no token to score", [""], {}),
        (UsageError, "list of token ids", [[1.5]], {}),
        (ContextLengthError, "window of 257 .* into the context of 256", TEXT, {"context": 257}),
        (ContextLengthError, "window of 260 .* smaller context", TEXT, {"context": 256, "stride": 8}),
        (ContextLengthError, "window of 301 .* as one text", ["a" * 300], {}),
        (TokenizerError, "token id 261", [261] * 600, {}),
    ],
)  # fmt: skip
def test_what_is_refused(
    llm: LLM, assert_idle: Idle, error: type[Exception], words: str, text: object, options: dict[str, int]
) -> None:
    with pytest.raises(error, match=words):
        llm.perplexity(text, **options)  # type: ignore[arg-type]
    assert_idle(llm)


def test_not_while_generating(llm: LLM, assert_idle: Idle) -> None:
    stream = llm.stream("abc", SamplingParams(max_tokens=5, ignore_eos=True))
    next(stream)
    with pytest.raises(UsageError, match="already generating"):
        llm.perplexity(TEXT, context=32)
    stream.close()
    assert llm.perplexity(TEXT, context=32).num_windows == 4
    assert_idle(llm)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers(
    tmp_path: Path, weights: Weights, assert_idle: Idle, value: float
) -> None:
    damaged = {name: array.copy() for name, array in weights.items()}
    damaged["model.embed_tokens.weight"][ord("q")] = value
    llm = LLM(write_checkpoint(tmp_path, BASE, damaged))
    with pytest.raises(CheckpointError, match=r"logits are not finite numbers: .*info --check"):
        llm.perplexity(["abcdqabc"])
    assert math.isfinite(llm.perplexity(["abcdabc"]).perplexity)
    assert_idle(llm)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260K.bin", "stories260Ktok512.gguf"])
def test_stories260k(shared: Path, name: str) -> None:
    """The figure was computed with NumPy alone; see the README of the fixtures."""
    folder = shared / "models" / "stories260K"
    text = (shared / "corpora" / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    llm = LLM(folder / name, tokenizer=folder / "tok512.model", max_model_len=512)
    found = llm.perplexity(stories)
    assert (found.num_windows, found.num_scored) == (5, 1804)
    assert found.mean_nll == pytest.approx(1.2664, abs=5e-5)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("options", "windows", "expected"),
    [
        ({"context": 512}, 159, 12.6153),
        ({"context": 256}, 319, 12.7176),
        ({"context": 480, "stride": 64, "max_windows": 200}, 200, 13.6877),
    ],
)
def test_llama_cpp_says_the_same(
    shared: Path, options: dict[str, int], windows: int, expected: float
) -> None:
    """llama-perplexity of llama-cpp-python 0.3.36 on the same file and text, with -c and --ppl-stride so.

    It multiplies by int8 activations of its own rounding and keeps keys and values in float16.
    """
    text = (shared / "corpora" / "tinyshakespeare.txt").read_bytes()[:200_000].decode()
    found = LLM(device="cpu").perplexity(text.removesuffix("\n"), **options)  # type: ignore[arg-type]
    assert found.num_windows == windows
    assert found.perplexity == pytest.approx(expected, rel=5e-4)


def test_mean_nll_is_that_of_the_reference(llm: LLM, weights: Weights) -> None:
    ids = [BOS, *b"to be or not to be"]
    logits = reference_logits(ModelConfig.from_hf(BASE), weights, ids, dtype=np.float64)
    assert llm.perplexity([ids]).mean_nll == pytest.approx(mean_nll(logits, ids), abs=1e-5)
