"""One prompt and what has been generated for it: integers and text, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from kuiperllm.config import SamplingParams

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
    """A prompt being worked on."""

    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    """What the draws are made from: `params.seed`, or one drawn for this sequence."""
    max_tokens: int
    """Most tokens to generate: `params.max_tokens`, or what the context leaves room for."""
    number: int = field(default_factory=lambda: next(_numbers))
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    """Cache blocks, in order."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_prefilled(self) -> bool:
        """Whether only the newest token is missing from the cache."""
        return self.num_computed >= self.num_tokens - 1 and bool(self.output_ids)

    def tokens(self, first: int, count: int) -> list[int]:
        """So many tokens from a place on, prompt first."""
        prompt = len(self.prompt_ids)
        if first + count <= prompt:
            return self.prompt_ids[first : first + count]
        return (self.prompt_ids + self.output_ids)[first : first + count]

    def token(self, place: int) -> int:
        """The token at a place, prompt first."""
        prompt = len(self.prompt_ids)
        return self.prompt_ids[place] if place < prompt else self.output_ids[place - prompt]
