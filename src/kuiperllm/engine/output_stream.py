"""How the tokens of one output become text, and when it ends."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from kuiperllm.engine.output import Completion, Delta
from kuiperllm.engine.request import Request
from kuiperllm.engine.sequence import Sequence
from kuiperllm.text import Detokenizer, StopStrings, Tokenizer


class OutputStream:
    """Turns the tokens of one sequence into deltas and, at its end, a completion.

    Args:
        request: what it is an output of.
        index: which of the request's outputs it is.
        sequence: what is generated; its `finish_reason` is set when it ends.
        tokenizer: the model's.
        stop_ids: token ids that end a text.
        streams: whether there is to be a delta for each token, or for the last one only.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        sequence: Sequence,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        *,
        streams: bool,
    ) -> None:
        params = sequence.params
        self.request = request
        self.index = index
        self.sequence = sequence
        self._embedding: NDArray[np.float32] | None = None
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_ids=sequence.prompt_ids
        )
        self._stops = StopStrings(params.stop)
        self._streams = streams
        self._reads_along = streams or bool(params.stop)
        stops = frozenset(params.stop_token_ids)
        self._stop_ids = stops if params.ignore_eos else stops | stop_ids
        self._is_quiet = not self._reads_along and sequence.guide is None
        """Whether a token means nothing but the end, if that."""
        self._text: list[str] = []
        self._stop_reason: str | int | None = None
        self._first_token: float | None = None
        self._is_first_delta = True

    def push(self, token_id: int) -> Delta | None:
        """Take in the newest token, which the sequence has already; None if there is nothing to tell yet."""
        if self._first_token is None:
            self._first_token = time.perf_counter()
        is_stop = token_id in self._stop_ids
        if self._is_quiet and not is_stop and len(self.sequence.output_ids) < self.sequence.max_tokens:
            return None
        text = ""
        if self._reads_along and not is_stop:
            text = self._stops.push(self._detokenizer.push(token_id))
        self._judge(token_id, is_stop)
        if self.sequence.finish_reason is not None:
            return self._end(text, self.sequence.output_ids[:-1] if is_stop else self.sequence.output_ids)
        self._text.append(text)
        return self._delta(text, [token_id]) if self._streams else None

    def abort(self) -> Delta:
        """End the output as it is."""
        self.sequence.finish_reason = "abort"
        return self._end("", self.sequence.output_ids, [])

    def embed(self, embedding: NDArray[np.float32]) -> Delta:
        """End with the prompt's embedding, [D]."""
        self._embedding = embedding
        self._first_token = time.perf_counter()
        self.sequence.finish_reason = "stop"
        return self._end("", [], [])

    def _judge(self, token_id: int, is_stop: bool) -> None:
        """Whether the output ends with this token, and why."""
        sequence = self.sequence
        if is_stop or self._stops.matched is not None:
            sequence.finish_reason = "stop"
            self._stop_reason = self._stops.matched
            if is_stop and token_id in sequence.params.stop_token_ids:
                self._stop_reason = token_id
            return
        if sequence.guide is not None:
            sequence.guide.accept(token_id)
            if sequence.guide.is_complete:
                sequence.finish_reason = "stop"
                return
        if len(sequence.output_ids) >= sequence.max_tokens:
            sequence.finish_reason = "length"

    def _end(self, text: str, ids_of_text: list[int], new_ids: list[int] | None = None) -> Delta:
        """The last delta.

        Args:
            text: what was read of the newest token.
            ids_of_text: all tokens that are text, for outputs that were not read along.
            new_ids: the tokens of the delta (default: the newest one).
        """
        if not self._reads_along:
            text = "".join(map(self._detokenizer.push, ids_of_text))
        if self._stops.matched is None:
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        self._text.append(text)
        if not self._streams:
            text, new_ids = "".join(self._text), self.sequence.output_ids
        return self._delta(
            text, self.sequence.output_ids[-1:] if new_ids is None else new_ids, self._completion()
        )

    def _delta(self, text: str, token_ids: list[int], completion: Completion | None = None) -> Delta:
        sequence, is_first = self.sequence, self._is_first_delta
        self._is_first_delta = False
        asked, of_prompt = sequence.params.logprobs is not None, sequence.params.prompt_logprobs is not None
        return Delta(
            request_id=self.request.request_id,
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=sequence.logprobs[len(sequence.logprobs) - len(token_ids) :] if asked else None,
            prompt_logprobs=sequence.prompt_logprobs if of_prompt and is_first else None,
            completion=completion,
        )

    def _completion(self) -> Completion:
        sequence, now, arrived = self.sequence, time.perf_counter(), self.request.arrived
        params, later = sequence.params, len(sequence.output_ids) - 1
        first = self._first_token
        assert sequence.finish_reason is not None
        known = [entry.logprob for entry in sequence.logprobs]
        return Completion(
            prompt_token_ids=sequence.prompt_ids,
            text="".join(self._text),
            token_ids=sequence.output_ids,
            finish_reason=sequence.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=sequence.logprobs if params.logprobs is not None else None,
            time_to_first_token_s=0.0 if first is None else first - arrived,
            decode_tokens_per_s=later / (now - first) if first is not None and later > 0 else 0.0,
            index=self.index,
            queue_s=(now if sequence.began is None else sequence.began) - arrived,
            total_s=now - arrived,
            num_cached_tokens=sequence.num_cached,
            mean_logprob=sum(known) / len(known) if known else None,
            prompt_logprobs=sequence.prompt_logprobs if params.prompt_logprobs is not None else None,
            embedding=self._embedding,
        )
