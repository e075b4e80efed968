"""The distance between two models: by hand on small arrays, and of models against the NumPy decoder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kuiperllm import LLM, CheckpointError, ContextLengthError, Device, ModelConfig, UsageError, compare
from kuiperllm.engine import comparison
from kuiperllm.engine.comparison import Differences, differences
from reference_llama import reference_logits
from tiny_models import BASE, BOS, SPECIALS, random_weights, write_checkpoint

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(150))


def only(reference: object, other: object, targets: list[int]) -> Differences:
    arrays = (np.array(logits, np.float32) for logits in (reference, other))
    (found,) = differences(*arrays, np.array(targets))
    return found


def test_divergence_by_hand() -> None:
    """p = 1/2, 1/4, 1/4 and q = 1/4, 1/4, 1/2: ln(2)/2 + 0 - ln(2)/4. Constants added to logits drop out."""
    p, q = np.log([0.5, 0.25, 0.25]) + 3, np.log([0.25, 0.25, 0.5]) - 1
    found = only([p, p], [q, p], [2, 0])
    assert found.kl == pytest.approx([math.log(2) / 4, 0], abs=1e-7)
    assert found.nll == pytest.approx([math.log(4), math.log(2)], rel=1e-6)
    assert found.other_nll == pytest.approx([math.log(2), math.log(2)], rel=1e-6)
    assert found.same_top.tolist() == [False, True]
    gaps = [math.log(0.5) - 4, -4.0, math.log(2) - 4]
    assert found.largest == pytest.approx([max(map(abs, gaps)), 0], rel=1e-6)
    assert found.squares == pytest.approx([sum(gap**2 for gap in gaps) / 3, 0], rel=1e-6)


def test_divergence_is_not_symmetric_and_survives_large_logits() -> None:
    found = only([[0, 1000, -1000]], [[0, 0, 0]], [1])  # p is certain, q is uniform
    assert found.kl == pytest.approx([math.log(3)])
    found = only([[0, 0, 0]], [[0, 1000, -1000]], [1])  # a third each, of what q finds e**-1000, 1, e**-2000
    assert found.kl == pytest.approx([1000 - math.log(3)], rel=1e-12)


def test_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 10, 50)).astype(np.float32)
    targets = rng.integers(0, 50, 10)
    (whole,) = differences(a, b, targets)
    monkeypatch.setattr(comparison, "_WIDE_ELEMENTS", 150)
    parts = list(differences(a, b, targets))
    assert len(parts) == 4
    for name in ("kl", "nll", "other_nll", "same_top", "largest", "squares"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_allclose(joined, getattr(whole, name), rtol=1e-14)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_number_is_refused(value: float, which: int) -> None:
    logits = np.zeros((2, 5, 3), np.float32)
    logits[which, 2, 1] = value
    with pytest.raises(CheckpointError, match=r"logits are not finite numbers: .*info --check"):
        list(differences(logits[0], logits[1], np.zeros(5, int)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """Two models whose weights differ a little; they take different numbers of tokens at once."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = random_weights(BASE), random_weights(BASE, seed=1)
    near = {name: 0.9 * first[name] + 0.1 * second[name] for name in first}
    write_checkpoint(folder / "a", BASE, first)
    write_checkpoint(folder / "b", BASE, near)
    return LLM(folder / "a", max_num_batched_tokens=24), LLM(folder / "b")


def test_models_against_the_reference_decoder(models: tuple[LLM, LLM]) -> None:
    first, second = random_weights(BASE), random_weights(BASE, seed=1)
    near = {name: 0.9 * first[name] + 0.1 * second[name] for name in first}
    ids = [BOS, *TEXT.encode()]
    logits: list[list[np.ndarray]] = [[], []]
    targets: list[int] = []
    for start in (0, 48, 96):
        window = [BOS, *ids[start + 1 : start + 48]]
        for which, weights in enumerate((first, near)):
            every = reference_logits(ModelConfig.from_hf(BASE), weights, window, dtype=np.float64)
            logits[which].append(every[24:-1])
        targets += window[25:]
    p, q = (np.concatenate(part) for part in logits)
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
    at = np.arange(len(targets)), targets
    gain = log_p[at] - log_q[at]

    told: list[tuple[int, int, float]] = []
    found = compare(*models, TEXT, context=48, progress=lambda *facts: told.append(facts))
    assert 0.01 < kl.mean() < 10  # they differ, and are not strangers
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_standard_error == pytest.approx(kl.std(ddof=1) / math.sqrt(len(kl)), rel=1e-3)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-3)
    assert found.kl_99 == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-3)
    assert found.same_top == np.mean(p.argmax(1) == q.argmax(1))
    assert 0 < found.same_top < 1
    assert found.logit_difference_max == pytest.approx(np.abs(p - q).max(), rel=1e-3)
    assert found.logit_difference_rms == pytest.approx(np.sqrt(np.mean((p - q) ** 2)), rel=1e-3)
    assert found.reference.mean_nll == pytest.approx(-log_p[at].mean(), abs=1e-5)
    assert found.other.mean_nll == pytest.approx(-log_q[at].mean(), abs=1e-5)
    assert found.perplexity_ratio == pytest.approx(math.exp(gain.mean()), rel=1e-4)
    assert found.perplexity_ratio_standard_error == pytest.approx(
        math.exp(gain.mean()) * gain.std(ddof=1) / math.sqrt(len(gain)), rel=1e-3
    )
    assert (found.reference.num_scored, found.reference.num_windows) == (len(targets), 3)
    assert [facts[:2] for facts in told] == [(48, 144), (96, 144), (144, 144)]
    assert told[-1][2] == pytest.approx(found.kl_mean)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_model_loaded_twice_differs_in_nothing(models: tuple[LLM, LLM], random_model: Path) -> None:
    found = compare(models[0], LLM(random_model, max_num_batched_tokens=24), ["abc", TEXT[:100]])
    assert (found.kl_max, found.logit_difference_max, found.same_top) == (0, 0, 1)
    assert found.perplexity_ratio == 1
    assert found.reference.num_scored == 103


def test_devices_can_be_compared(random_model: Path, cuda: Device) -> None:
    """In float32, a GPU and the processor differ by the order of sums."""
    on_gpu = LLM(random_model, device=str(cuda), max_num_batched_tokens=16)
    found = compare(LLM(random_model, device="cpu"), on_gpu, [TEXT[:40]])
    assert 0 < found.logit_difference_max < 2e-4
    assert found.kl_max < 1e-6
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)


def test_perplexities_are_those_of_each_model_alone(models: tuple[LLM, LLM]) -> None:
    found = compare(*models, TEXT, context=48)
    for llm, part in zip(models, (found.reference, found.other), strict=True):
        alone = llm.perplexity(TEXT, context=48)
        assert part.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert part.standard_error == pytest.approx(alone.standard_error, rel=1e-4)


def test_vocabularies_of_different_size_are_refused(models: tuple[LLM, LLM], tmp_path: Path) -> None:
    config = BASE | {"vocab_size": 263}
    other = LLM(write_checkpoint(tmp_path, config, random_weights(config)))
    with pytest.raises(UsageError, match=r"vocabulary of 261 and .* one of 263; only models of the same"):
        compare(models[0], other, TEXT, context=48)


def test_tokenizers_that_disagree_are_refused(models: tuple[LLM, LLM], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, BASE, random_weights(BASE))
    path = tmp_path / "tokenizer.json"
    known = json.loads(path.read_text())
    vocab = known["model"]["vocab"]
    vocab["c"], vocab["d"] = vocab["d"], vocab["c"]
    path.write_text(json.dumps(known))
    other = LLM(tmp_path)
    with pytest.raises(UsageError, match="different tokens of this text, from token 2 on"):
        compare(models[0], other, ["abdc", "x"])
    ids = [BOS, *b"abdc"]
    assert compare(models[0], other, [ids]).kl_max == 0  # ids need no tokenizer
    assert len(SPECIALS) == 4


def test_one_llm_twice_and_short_contexts_are_refused(models: tuple[LLM, LLM], random_model: Path) -> None:
    with pytest.raises(UsageError, match="two models"):
        compare(models[0], models[0], TEXT)
    shorter = LLM(random_model, max_model_len=40)
    with pytest.raises(ContextLengthError, match="48 tokens does not fit into the context of 40"):
        compare(models[0], shorter, TEXT, context=48)
    assert compare(models[0], shorter, TEXT).reference.context == 40
