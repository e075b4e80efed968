"""How far the predictions of one model are from those of another, token by token."""

from __future__ import annotations

import time
from collections.abc import Generator
from collections.abc import Sequence as List
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.engine.perplexity import Cut, Perplexity, Watch, cut, exp, several, standard_error, without_nan
from kuiperllm.engine.scoring import Scorer, not_finite
from kuiperllm.engine.windows import Window
from kuiperllm.errors import UsageError

if TYPE_CHECKING:
    from kuiperllm.engine.llm import LLM, Prompt

Array = NDArray[Any]
Floats = NDArray[np.float64]

_WIDE_ELEMENTS = 1 << 20
"""Logits that are held in float64 at once; each takes some 60 bytes of work space."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was measured. A divergence is in nats, and of what both models say in the place of one token."""

    kl_mean: float
    """Kullback-Leibler divergence of the other model, q, from the reference, p: the sum of p ln(p / q)."""
    kl_standard_error: float
    """Of the mean, as if tokens were independent of each other."""
    kl_median: float
    kl_99: float
    """99 of 100 tokens have less."""
    kl_max: float
    same_top: float
    """Part of the tokens, 0 to 1, for which both models find the same token the most likely."""
    logit_difference_max: float
    """Largest absolute difference of two logits."""
    logit_difference_rms: float
    """Root of the mean square of all differences."""
    perplexity_ratio: float
    """The other model's perplexity by that of the reference."""
    perplexity_ratio_standard_error: float
    """From the differences of each token's likelihoods, so far smaller than the perplexities' own errors."""
    reference: Perplexity
    other: Perplexity

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return without_nan(asdict(self))


@dataclass(frozen=True, slots=True)
class Differences:
    """What a comparison needs of some tokens, one entry for each."""

    kl: Floats
    nll: Floats
    """Negative log likelihood of the token that follows, by the reference."""
    other_nll: Floats
    same_top: NDArray[np.bool_]
    largest: Floats
    """Absolute difference of logits."""
    squares: Floats
    """Mean squared difference of logits."""


def compare(
    reference: LLM,
    other: LLM,
    text: Prompt | List[Prompt],
    *,
    context: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Watch | None = None,
) -> Comparison:
    """Run a text through two models side by side.

    Args:
        reference: the model that is taken for the truth, and whose tokenizer is used.
        other: the model whose distance from it is measured; of the same vocabulary.
        text: see `LLM.perplexity`; so are `context`, `stride` and `max_windows`.
        progress: told of progress as (tokens taken in, tokens in all, mean divergence so far).

    Raises:
        UsageError: the vocabularies differ, the text is too short, or one LLM was given twice.
        ContextLengthError: a window does not fit into a model's context.
        CheckpointError: a logit is no finite number.
        TokenizerError: the text cannot be encoded, or a token id is out of range.
    """
    if reference is other:
        raise UsageError("compare needs two models, and was given one LLM twice: load it once more")
    _check_vocabularies(reference, other, text)
    windows = cut(
        reference,
        text,
        context=context,
        stride=stride,
        max_windows=max_windows,
        max_model_len=min(reference.max_model_len, other.max_model_len),
    )
    parts: list[Differences] = []
    done, total, count = 0, 0.0, 0
    with reference.scorer() as first, other.scorer() as second:
        pair = _Pair(first, second)
        for window in windows.windows:
            for part in pair.differences(window):
                parts.append(part)
                total, count = total + part.kl.sum(), count + len(part.kl)
            done += window.length
            if progress is not None:
                progress(done, windows.num_tokens, total / count)
    return _summary(parts, windows, pair.seconds)


class _Pair:
    """Two models that read the same text; `seconds` is what each has taken for each window."""

    def __init__(self, reference: Scorer, other: Scorer) -> None:
        self.seconds: tuple[list[float], list[float]] = [], []
        self._scorers = reference, other
        self._max_tokens = min(reference.max_tokens, other.max_tokens)

    def differences(self, window: Window) -> Generator[Differences, None, None]:
        ids = window.ids
        for seconds in self.seconds:
            seconds.append(0.0)
        first, second = (
            scorer.logits(ids, window.first, max_tokens=self._max_tokens) for scorer in self._scorers
        )
        with closing(first), closing(second):
            while (a := self._next(0, first)) is not None and (b := self._next(1, second)) is not None:
                place, logits = a
                targets = np.array(ids[place : place + len(logits)])
                yield from differences(logits, b[1], targets)

    def _next(
        self, which: int, slices: Generator[tuple[int, Tensor], None, None]
    ) -> tuple[int, Array] | None:
        """A model's next slice, on the host."""
        started = time.perf_counter()
        found = next(slices, None)
        on_host = None if found is None else (found[0], found[1].numpy())
        self.seconds[which][-1] += time.perf_counter() - started
        return on_host


def differences(reference: Array, other: Array, targets: Array) -> Generator[Differences, None, None]:
    """What a comparison needs of some tokens, computed in float64, some rows at a time.

    Args:
        reference: logits, [S, V].
        other: logits, [S, V].
        targets: the token that follows each, [S].

    Raises:
        CheckpointError: a logit is no finite number.
    """
    rows = max(1, _WIDE_ELEMENTS // reference.shape[1])
    for begin in range(0, len(targets), rows):
        some = slice(begin, begin + rows)
        p, q = reference[some].astype(np.float64), other[some].astype(np.float64)
        if not (np.isfinite(p).all() and np.isfinite(q).all()):
            raise not_finite()
        yield _differences(p, q, targets[some])


def _differences(p: Floats, q: Floats, targets: Array) -> Differences:
    gap = q - p
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    at_target = np.arange(len(targets)), targets
    divergence = np.einsum("sv,sv->s", np.exp(log_p), log_p - log_q)
    return Differences(
        kl=np.maximum(divergence, 0.0),  # rounding can bring it below
        nll=-log_p[at_target],
        other_nll=-log_q[at_target],
        same_top=p.argmax(axis=1) == q.argmax(axis=1),
        largest=np.abs(gap).max(axis=1),
        squares=np.einsum("sv,sv->s", gap, gap) / gap.shape[1],
    )


def _log_softmax(x: Floats) -> Floats:
    shifted = x - x.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _summary(parts: List[Differences], windows: Cut, seconds: tuple[List[float], List[float]]) -> Comparison:
    def joined(name: str) -> Floats:
        values: Floats = np.concatenate([getattr(part, name) for part in parts])
        return values

    kl, nll, other_nll = joined("kl"), joined("nll"), joined("other_nll")
    median, high = np.percentile(kl, [50, 99])
    ratio = exp(float((other_nll - nll).mean()))
    return Comparison(
        kl_mean=float(kl.mean()),
        kl_standard_error=standard_error(kl),
        kl_median=float(median),
        kl_99=float(high),
        kl_max=float(kl.max()),
        same_top=float(joined("same_top").mean()),
        logit_difference_max=float(joined("largest").max()),
        logit_difference_rms=float(np.sqrt(joined("squares").mean())),
        perplexity_ratio=ratio,
        perplexity_ratio_standard_error=ratio * standard_error(other_nll - nll),
        reference=Perplexity.of(nll, windows, seconds[0]),
        other=Perplexity.of(other_nll, windows, seconds[1]),
    )


def _check_vocabularies(reference: LLM, other: LLM, text: Prompt | List[Prompt]) -> None:
    """Refuse models whose logits are not of the same tokens, as far as this text shows it."""
    first, second = reference.loaded.name, other.loaded.name
    sizes = reference.config.vocab_size, other.config.vocab_size
    advice = "only models of the same vocabulary can be compared"
    if sizes[0] != sizes[1]:
        raise UsageError(f"{first} has a vocabulary of {sizes[0]} and {second} one of {sizes[1]}; {advice}")
    texts = several(text)
    parts: List[object] = [text] if texts is None else texts
    for part in parts:
        if not isinstance(part, str):
            continue
        tokens = [llm.tokenizer.encode(part, add_special_tokens=False) for llm in (reference, other)]
        if tokens[0] != tokens[1]:
            place = next(
                (i for i, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b), min(map(len, tokens))
            )
            raise UsageError(
                f"the tokenizers of {first} and {second} make different tokens of this text, from token "
                f"{place} on; {advice} (--tokenizer takes one for both)"
            )
