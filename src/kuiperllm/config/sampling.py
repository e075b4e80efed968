"""How tokens are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, cast

from kuiperllm.config.engine import is_whole
from kuiperllm.errors import SamplingError

_MOST_OUTPUTS = 128
_MAY_BE_NONE = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "best_of")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop; names and meanings as in vLLM and the OpenAI API.

    The order of the steps is: penalties, temperature, top-k, top-p, min-p, then a draw. A temperature of 0
    takes the most likely token.

    Raises:
        SamplingError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one."""
    repetition_penalty: float = 1.0
    """Divide positive (multiply negative) logits of tokens seen in prompt or output by this."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens that were generated."""
    frequency_penalty: float = 0.0
    """Subtract this times the number of times that the token was generated."""
    seed: int | None = None
    """The same seed, prompt and parameters give the same text; None draws a seed."""
    max_tokens: int | None = None
    """Most tokens to generate; None: until the model stops or the context is full."""
    min_tokens: int = 0
    """End-of-text and stop tokens are suppressed before this many."""
    stop: tuple[str, ...] | str = ()
    """Texts that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the model's own end-of-text ids."""
    ignore_eos: bool = False
    """Go on after the model's end-of-text token."""
    logprobs: int | None = None
    """Report the log probability of each token and of this many most likely ones."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    n: int = 1
    """How many outputs to make for a prompt."""
    best_of: int | None = None
    """Generate this many and give the `n` whose tokens have the highest mean log probability; None: `n`."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """What to add to the logits of some token ids, -100 to 100; kept as pairs in ascending order."""
    prompt_logprobs: int | None = None
    """Report the log probability of each token of the prompt, and of this many most likely ones there."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            self._require(name, isinstance(getattr(self, name), Iterable), "a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            self._require(name, isinstance(getattr(self, name), Real), "a number")
        for name in ("top_k", "min_tokens", "n", *_MAY_BE_NONE):
            value = getattr(self, name)
            may_be_none = name in _MAY_BE_NONE
            self._require(name, is_whole(value) or (may_be_none and value is None), "a whole number")
        self._require("temperature", 0.0 <= self.temperature <= 100.0, "0 to 100")
        self._require("top_k", self.top_k >= 0, "0 (all) or above")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "above 0, up to 1")
        self._require("min_p", 0.0 <= self.min_p <= 1.0, "0 to 1")
        self._require("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, up to 100")
        self._require("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "-2 to 2")
        self._require("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "-2 to 2")
        self._require("seed", self.seed is None or 0 <= self.seed < 1 << 64, "0 to 2**64 - 1")
        self._require("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._require("min_tokens", self.min_tokens >= 0, "0 or above")
        self._require("logprobs", self.logprobs is None or 0 <= self.logprobs <= 100, "0 to 100")
        reported = self.prompt_logprobs
        self._require("prompt_logprobs", reported is None or 0 <= reported <= 100, "0 to 100")
        self._require("n", 1 <= self.n <= _MOST_OUTPUTS, f"1 to {_MOST_OUTPUTS}")
        best = self.best_of
        self._require("best_of", best is None or self.n <= best <= _MOST_OUTPUTS, f"n to {_MOST_OUTPUTS}")
        self._require("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings")
        self._require("stop_token_ids", all(is_whole(i) and i >= 0 for i in self.stop_token_ids), "token ids")
        object.__setattr__(self, "logit_bias", self._checked_bias())
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")

    def _checked_bias(self) -> tuple[tuple[int, float], ...]:
        given, allowed = self.logit_bias, "token ids with numbers from -100 to 100"
        self._require("logit_bias", isinstance(given, Iterable), allowed)
        pairs = tuple(given.items()) if isinstance(given, Mapping) else tuple(given)
        self._require("logit_bias", all(isinstance(p, tuple) and len(p) == 2 for p in pairs), allowed)
        self._require("logit_bias", all(is_whole(i) and i >= 0 for i, _ in pairs), allowed)
        values: list[Any] = [value for _, value in pairs]
        self._require("logit_bias", all(isinstance(x, Real) for x in values), allowed)
        self._require("logit_bias", all(-100 <= x <= 100 for x in values), allowed)
        return tuple(sorted(dict(pairs).items()))

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:  # also refuses NaN, which fails every comparison
            raise SamplingError(f"{name}={getattr(self, name)!r} is not possible; allowed: {allowed}")

    @property
    def has_penalties(self) -> bool:
        """Whether the next token depends on those before it in other ways than by the model."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    @property
    def num_outputs(self) -> int:
        """How many outputs are generated, whether or not all are given."""
        return self.best_of or self.n

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def with_changes(self, **changes: Any) -> SamplingParams:
        """A copy with some fields replaced."""
        return replace(self, **changes)
