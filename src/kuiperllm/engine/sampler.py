"""Chooses the next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kuiperllm.config import SamplingParams
from kuiperllm.core import Device, Tensor
from kuiperllm.engine.sequence import Sequence, TokenLogprobs
from kuiperllm.ops.argmax import argmax
from kuiperllm.ops.logprobs import logprobs
from kuiperllm.ops.penalize import penalize
from kuiperllm.ops.sample import sample


class Sampler:
    """Applies the `SamplingParams` of each sequence, on the device.

    Args:
        vocab_size: ids below this may be chosen; a model can have more rows than its tokenizer has tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @staticmethod
    def is_plain(sequence: Sequence) -> bool:
        """Whether the next token depends on the logits and a draw alone, so that no host has to help."""
        params = sequence.params
        return not (
            _has_penalties(params)
            or params.logprobs is not None
            or len(sequence.output_ids) < params.min_tokens
        )

    def sample(self, logits: Tensor, sequences: list[Sequence], stop_ids: frozenset[int]) -> list[int]:
        """One token for each row of logits; `TokenLogprobs` are added to the sequences that ask for them.

        Args:
            logits: float32 [S, V]; overwritten where penalties apply.
            sequences: what the rows belong to.
            stop_ids: ids that `SamplingParams.min_tokens` holds back, besides the sequence's own stop ids.
        """
        logits = logits[:, : self.vocab_size]
        wants_logprobs = any(sequence.params.logprobs is not None for sequence in sequences)
        penalized = [(row, s) for row, s in enumerate(sequences) if _has_penalties(s.params)]
        early = [(row, s) for row, s in enumerate(sequences) if len(s.output_ids) < s.params.min_tokens]
        own = logits.clone() if wants_logprobs and (penalized or early) else logits
        if penalized:
            _penalize(logits, penalized, [sequence.params for sequence in sequences])
        if early:
            _forbid(logits, [(row, {*stop_ids, *s.params.stop_token_ids}) for row, s in early])
        chosen = self._choose(logits, sequences)
        if wants_logprobs:
            _report(own, chosen, sequences)
        return [int(token_id) for token_id in chosen.numpy()]

    @staticmethod
    def _choose(logits: Tensor, sequences: list[Sequence]) -> Tensor:
        params = [sequence.params for sequence in sequences]
        if all(p.greedy for p in params):
            return argmax(logits)
        put = _putter(logits.device)
        return sample(
            logits,
            put([p.temperature for p in params], np.float32),
            put([p.top_k for p in params], np.int32),
            put([p.top_p for p in params], np.float32),
            put([p.min_p for p in params], np.float32),
            put(np.array([s.seed for s in sequences], np.uint64).view(np.int64), np.int64),
            put([s.num_tokens for s in sequences], np.int32),
        )


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def _penalize(logits: Tensor, penalized: list[tuple[int, Sequence]], params: list[SamplingParams]) -> None:
    put = _putter(logits.device)
    ids: list[int] = []
    rows: list[int] = []
    counts: list[int] = []
    for row, sequence in penalized:
        seen = dict.fromkeys(sequence.prompt_ids, 0)
        for token_id in sequence.output_ids:
            seen[token_id] = seen.get(token_id, 0) + 1
        ids.extend(seen)
        rows.extend([row] * len(seen))
        counts.extend(seen.values())
    penalize(
        logits,
        put(ids, np.int32),
        put(rows, np.int32),
        put(counts, np.int32),
        put([p.repetition_penalty for p in params], np.float32),
        put([p.presence_penalty for p in params], np.float32),
        put([p.frequency_penalty for p in params], np.float32),
    )


def _forbid(logits: Tensor, forbidden: Iterable[tuple[int, set[int]]]) -> None:
    """Set logits to minus infinity: a presence penalty that nothing can make up for."""
    put = _putter(logits.device)
    pairs = [(row, token_id) for row, ids in forbidden for token_id in ids]
    size = logits.shape[0]
    penalize(
        logits,
        put([token_id for _, token_id in pairs], np.int32),
        put([row for row, _ in pairs], np.int32),
        put([1] * len(pairs), np.int32),
        put([1.0] * size, np.float32),
        put([np.inf] * size, np.float32),
        put([0.0] * size, np.float32),
    )


def _report(logits: Tensor, chosen: Tensor, sequences: list[Sequence]) -> None:
    most = max(sequence.params.logprobs or 0 for sequence in sequences)
    own, top_ids, top_values = (t.numpy() for t in logprobs(logits, chosen, min(most, logits.shape[1])))
    for row, (sequence, token_id) in enumerate(zip(sequences, chosen.numpy(), strict=True)):
        if (count := sequence.params.logprobs) is not None:
            top = zip(top_ids[row, :count].tolist(), top_values[row, :count].tolist(), strict=True)
            sequence.logprobs.append(TokenLogprobs(int(token_id), float(own[row]), tuple(top)))


def _putter(device: Device) -> Callable[[Any, type], Tensor]:
    return lambda values, dtype: Tensor.from_numpy(np.asarray(values, dtype)).to(device)
