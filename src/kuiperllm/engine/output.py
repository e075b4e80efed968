"""What generating returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuiperllm.engine.sequence import FinishReason, TokenLogprobs
from kuiperllm.errors import KuiperError


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation."""

    prompt_token_ids: list[int]
    text: str
    """The output without what ended it."""
    token_ids: list[int]
    """The output's tokens; an end-of-text token is among them."""
    finish_reason: FinishReason
    """`stop`: an end-of-text token, stop token or stop string; `length`: `max_tokens` or a full context;
    `abort`: the request was given up."""
    stop_reason: str | int | None
    """The stop string or stop token id that ended the output; None for end-of-text tokens."""
    logprobs: list[TokenLogprobs] | None
    """One entry for each output token, if asked for."""
    time_to_first_token_s: float
    decode_tokens_per_s: float
    """Output tokens after the first, by the time they took; 0 if there was only one."""
    index: int = 0
    """Which of the outputs of its request this is; the best one first if `best_of` chose."""
    queue_s: float = 0.0
    """From the request's arrival until work on it began."""
    total_s: float = 0.0
    """From the request's arrival to the end."""
    num_cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were found in the prefix cache."""
    mean_logprob: float | None = None
    """Of the output's tokens, if `best_of` or `logprobs` made it known."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry for each prompt token, the first of them None, if asked for."""
    embedding: NDArray[np.float32] | None = None
    """[D]: the normalized last hidden state, if asked for; not scaled to any length."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What became certain with one token."""

    text: str
    """May be empty while a character or a possible stop string is incomplete."""
    token_id: int
    logprobs: TokenLogprobs | None
    completion: Completion | None
    """Set on the last chunk."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What became certain for one output since the last time: one token or several, text, the end."""

    request_id: str
    index: int
    """Which of the request's outputs."""
    text: str
    """May be empty while a character or a possible stop string is incomplete."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    """One for each of `token_ids`, if asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the first delta, if asked for; see `Completion`."""
    completion: Completion | None = None
    """Set on the last delta of the output."""
    error: KuiperError | None = None
    """Why the whole request failed; nothing follows."""
