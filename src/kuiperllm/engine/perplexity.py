"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import asdict, dataclass
from numbers import Integral
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from kuiperllm.engine.windows import MIN_CONTEXT, Window, chunks, sliding, whole
from kuiperllm.errors import ContextLengthError, UsageError

if TYPE_CHECKING:
    from kuiperllm.engine.llm import LLM, Prompt

DEFAULT_CONTEXT = 512

Watch = Callable[[int, int, float], None]
"""Told of progress as (tokens taken in, tokens in all, the figure so far)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A text in windows, and how it was cut."""

    windows: List[Window]
    context: int | None
    """Tokens in a window, before the stride adds to them; None: several texts, each of them whole."""
    stride: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens that a model takes in for all windows."""
        return sum(window.length for window in self.windows)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What was measured, and how."""

    perplexity: float
    """e to the power of `mean_nll`."""
    standard_error: float
    """Of `perplexity`, as if tokens were independent of each other; NaN if one alone was scored."""
    mean_nll: float
    """Mean negative log likelihood of the scored tokens, in nats."""
    num_scored: int
    """Tokens that the mean is over."""
    num_windows: int
    """Windows of the text that the model saw, each by itself."""
    context: int | None
    """Tokens in a window, before the stride adds to them; None: several texts, each of them whole."""
    stride: int | None
    """Tokens from the beginning of a window to that of the next, where that was asked for."""
    num_tokens: int
    """Tokens that the model took in, scored or not."""
    seconds: float
    tokens_per_s: float
    """Tokens taken in: the median of the windows, since the first may have kernels to compile."""

    @classmethod
    def of(cls, nll: NDArray[np.float64], cut: Cut, seconds: List[float]) -> Perplexity:
        """From the negative log likelihood of each scored token, and the time for each window."""
        mean = float(nll.mean())
        speeds = [window.length / s for window, s in zip(cut.windows, seconds, strict=True)]
        return cls(
            perplexity=exp(mean),
            standard_error=exp(mean) * standard_error(nll),
            mean_nll=mean,
            num_scored=len(nll),
            num_windows=len(cut.windows),
            context=cut.context,
            stride=cut.stride,
            num_tokens=cut.num_tokens,
            seconds=sum(seconds),
            tokens_per_s=median(speeds),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return without_nan(asdict(self))


def perplexity(
    llm: LLM,
    text: Prompt | List[Prompt],
    *,
    context: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Watch | None = None,
) -> Perplexity:
    """See `LLM.perplexity`."""
    windows = cut(llm, text, context=context, stride=stride, max_windows=max_windows)
    parts: list[NDArray[np.float64]] = []
    seconds: list[float] = []
    done, total, count = 0, 0.0, 0
    with llm.scorer() as scorer:
        for window in windows.windows:
            started = time.perf_counter()
            parts.append(-scorer.logprobs(window.ids, window.first))
            seconds.append(time.perf_counter() - started)
            done, total, count = done + window.length, total + parts[-1].sum(), count + len(parts[-1])
            if progress is not None:
                progress(done, windows.num_tokens, exp(total / count))
    return Perplexity.of(np.concatenate(parts), windows, seconds)


def cut(
    llm: LLM,
    text: Prompt | List[Prompt],
    *,
    context: int | None,
    stride: int | None,
    max_windows: int | None,
    max_model_len: int | None = None,
) -> Cut:
    """The windows of a text, for a model. Arguments and errors are those of `LLM.perplexity`.

    `max_model_len` is the longest window that is possible, if that is not what the model allows.
    """
    longest = max_model_len or llm.max_model_len
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"the number of windows must be at least 1, not {max_windows}")
    texts = several(text)
    if texts is not None:
        if context is not None or stride is not None:
            raise UsageError("context and stride are for one long text; several texts are scored whole")
        windows = whole([llm.token_ids(part) for part in texts])[:max_windows]
        if not windows:
            raise UsageError("there is no token to score: the texts are empty, or of one token each")
        _check_fits(max(window.length for window in windows), longest, "score it as one text, or")
        return Cut(windows, None, None)
    half = 0 if stride is None else stride // 2
    if context is None:
        context = max(MIN_CONTEXT, min(DEFAULT_CONTEXT, longest - half))
    if context < MIN_CONTEXT:
        raise UsageError(f"the context must be at least {MIN_CONTEXT} tokens, not {context}")
    _check_fits(context + half, longest, "use a smaller context, or")
    ids, tokenizer = llm.token_ids(cast("Prompt", text)), llm.tokenizer
    bos = tokenizer.bos_token_id if tokenizer.add_bos else None
    windows = chunks(ids, context, bos) if stride is None else sliding(ids, context, stride)
    return Cut(windows[:max_windows], context, stride)


def several(text: Prompt | List[Prompt]) -> list[Prompt] | None:
    """The texts, if these are several; None: it is one, or the ids of one."""
    if isinstance(text, str) or (len(text) and all(isinstance(part, Integral) for part in text)):
        return None
    return list(cast("List[Prompt]", text))


def _check_fits(length: int, longest: int, advice: str) -> None:
    if length > longest:
        raise ContextLengthError(
            f"a window of {length} tokens does not fit into the context of {longest}; {advice} "
            "raise max_model_len if the model can do more than it states"
        )


# --- arithmetic -------------------------------------------------------------------------------------------


def exp(x: float) -> float:
    """e**x; infinite where that is too large for a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def standard_error(values: NDArray[np.float64]) -> float:
    """Of their mean, as if they were independent; NaN for a single one."""
    return float(values.std() / math.sqrt(len(values) - 1)) if len(values) > 1 else math.nan


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None in the place of what is no finite number."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return without_nan(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: known(value) for name, value in values.items()}
