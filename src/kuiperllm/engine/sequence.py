"""One output being made: its tokens and where it stands. Integers, no text and no tensors."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Literal

import numpy as np

from kuiperllm.config import SamplingParams
from kuiperllm.engine.prefix_cache import Place

if TYPE_CHECKING:
    from kuiperllm.engine.penalties import SeenTokens
    from kuiperllm.engine.request import Guide

FinishReason = Literal["stop", "length", "abort"]

_numbers = count()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log probability of a chosen token, and of the most likely ones, from the model's own logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability), most likely first; `SamplingParams.logprobs` of them."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and its continuation."""

    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    """What the draws are made from: `params.seed`, or one drawn for this sequence."""
    max_tokens: int
    """Most tokens to generate: `params.max_tokens`, or what the context leaves room for."""
    priority: int = 0
    """Lower goes first."""
    cache_salt: str = ""
    """Only sequences of the same salt share blocks."""
    num_logprobs: int | None = None
    """Of how many most likely tokens to report log probabilities beside each chosen one's; None: of none."""
    embeds: bool = False
    """Whether only the prompt is worked on, for its last hidden state."""
    guide: Guide | None = None
    number: int = field(default_factory=lambda: next(_numbers))
    """In the order of arrival."""

    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    num_tokens: int = field(init=False)
    """Tokens of prompt and output; those that a queued pass will add included."""
    num_pending: int = 0
    """Those of them that are not known yet."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache once all queued passes are done."""
    limit: int = field(init=False)
    """Most tokens of prompt and output."""
    bent_until: int = field(init=False)
    """Up to which token of it the host has a part in choosing: 0 if it has none at all."""
    began: float | None = None
    """When its first step was queued, by `time.perf_counter`."""
    num_cached: int = 0
    """Tokens of the prompt that were found in the prefix cache at first."""
    row: int = -1
    """Which of the scheduler's rows it has while it runs."""
    blocks: list[int] = field(default_factory=list)
    """Cache blocks, in order."""
    num_remembered: int = 0
    """Blocks that the prefix cache knows, or that equal some that it knows."""
    place: Place = ""
    """The place behind the last of these."""
    seen: SeenTokens | None = None
    """For penalties: what its text holds."""

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_ids)
        self.limit = self.num_tokens + self.max_tokens
        params = self.params
        is_bent = self.guide is not None or bool(params.logit_bias) or params.has_penalties
        early = self.num_tokens + params.min_tokens if params.min_tokens else 0
        self.bent_until = sys.maxsize if is_bent else early
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)  # nothing comes before the first token

    @property
    def num_known(self) -> int:
        """Tokens that the host knows."""
        return self.num_tokens - self.num_pending

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some tokens of the prompt are still to be reported on."""
        asked = self.params.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < len(self.prompt_ids)

    @property
    def is_bent(self) -> bool:
        """Whether the token that a scheduled step will choose depends on more than the logits and a draw."""
        return self.num_tokens <= self.bent_until

    def tokens(self, first: int, count: int) -> list[int]:
        """So many tokens from a place on, prompt first."""
        prompt = len(self.prompt_ids)
        if first + count <= prompt:
            return self.prompt_ids[first : first + count]
        if first >= prompt:
            return self.output_ids[first - prompt : first - prompt + count]
        return self.prompt_ids[first:] + self.output_ids[: first + count - prompt]

    def token_bytes(self, first: int, count: int) -> bytes:
        """The same as int32."""
        return np.array(self.tokens(first, count), np.int32).tobytes()
