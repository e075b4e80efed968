"""What generating returns, and how tokens become it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuiperllm.engine.sequence import FinishReason, Sequence, TokenLogprobs
from kuiperllm.errors import KuiperError
from kuiperllm.text import Detokenizer, StopStrings, Tokenizer


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


class OutputStream:
    """Turns the tokens of one sequence into chunks and, at its end, a completion.

    Args:
        index: which of the prompts of a call this is.
        sequence: what is generated; its `finish_reason` is set when it ends.
        tokenizer: the model's.
        started: when the call began, by `time.perf_counter`.
    """

    def __init__(self, index: int, sequence: Sequence, tokenizer: Tokenizer, started: float) -> None:
        self.index = index
        self._sequence = sequence
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=sequence.params.skip_special_tokens,
            prompt_ids=sequence.prompt_ids,
        )
        self._stops = StopStrings(sequence.params.stop)
        self._text: list[str] = []
        self._started = started
        self._first_token: float | None = None

    def push(self, token_id: int, *, is_stop: bool) -> Chunk:
        """Take in the newest token of the sequence."""
        sequence, now = self._sequence, time.perf_counter()
        if self._first_token is None:
            self._first_token = now
        text = "" if is_stop else self._stops.push(self._detokenizer.push(token_id))
        stop_reason: str | int | None = self._stops.matched
        if self._stops.matched is not None or is_stop:
            sequence.finish_reason = "stop"
            if is_stop and token_id in sequence.params.stop_token_ids:
                stop_reason = token_id
        elif len(sequence.output_ids) >= sequence.max_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None and self._stops.matched is None:
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        self._text.append(text)
        logprobs = sequence.logprobs[-1] if sequence.params.logprobs is not None else None
        return Chunk(text, token_id, logprobs, self._completion(now, stop_reason))

    def _completion(self, now: float, stop_reason: str | int | None) -> Completion | None:
        sequence = self._sequence
        if sequence.finish_reason is None or self._first_token is None:
            return None
        later = len(sequence.output_ids) - 1
        return Completion(
            prompt_token_ids=sequence.prompt_ids,
            text="".join(self._text),
            token_ids=sequence.output_ids,
            finish_reason=sequence.finish_reason,
            stop_reason=stop_reason,
            logprobs=sequence.logprobs if sequence.params.logprobs is not None else None,
            time_to_first_token_s=self._first_token - self._started,
            decode_tokens_per_s=later / (now - self._first_token) if later else 0.0,
        )
