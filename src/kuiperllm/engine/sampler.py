"""Bends logits as requests ask, where the host has a part in choosing tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kuiperllm.config import SamplingParams
from kuiperllm.core import Device, Tensor
from kuiperllm.engine.penalties import SeenTokens
from kuiperllm.engine.sequence import Sequence
from kuiperllm.ops.bias_logits import bias_logits
from kuiperllm.ops.mask_logits import mask_logits
from kuiperllm.ops.penalize import penalize

OnError = Callable[[Sequence, Exception], None]


class Sampler:
    """Penalties, biases, tokens that may not come yet, grammars: in this order.

    Args:
        stop_ids: ids that `SamplingParams.min_tokens` holds back, besides a sequence's own stop ids.
    """

    def __init__(self, stop_ids: frozenset[int] = frozenset()) -> None:
        self.stop_ids = stop_ids

    def bend(self, logits: Tensor, sequences: list[Sequence], on_error: OnError) -> None:
        """Change logits in place.

        Args:
            logits: float32 [S, V].
            sequences: what the rows belong to; all their tokens but the next one are known.
            on_error: told when a sequence's guide fails.
        """
        live = [(row, s) for row, s in enumerate(sequences) if s.finish_reason is None]
        penalized = [(row, s) for row, s in live if s.params.has_penalties]
        if penalized:
            _penalize(logits, penalized, [sequence.params for sequence in sequences])
        biases = {(row, i): value for row, s in live for i, value in s.params.bias_pairs}
        for row, sequence in live:
            if len(sequence.output_ids) < sequence.params.min_tokens:
                stops = (*self.stop_ids, *sequence.params.stop_token_ids)
                biases |= dict.fromkeys(((row, i) for i in stops), -np.inf)
        if biases:
            _bias(logits, biases)
        guided = [(row, s) for row, s in live if s.guide is not None]
        if guided:
            _mask(logits, guided, on_error)


def _penalize(logits: Tensor, penalized: list[tuple[int, Sequence]], params: list[SamplingParams]) -> None:
    for _, sequence in penalized:
        if sequence.seen is None:
            sequence.seen = SeenTokens(sequence.prompt_ids)
        sequence.seen.update(sequence.output_ids)
    seen = [(row, sequence.seen) for row, sequence in penalized if sequence.seen is not None]
    put = _putter(logits.device)
    penalize(
        logits,
        put(np.concatenate([tokens.ids for _, tokens in seen]), np.int32),
        put(np.repeat([row for row, _ in seen], [len(tokens.ids) for _, tokens in seen]), np.int32),
        put(np.concatenate([tokens.counts for _, tokens in seen]), np.int32),
        put([p.repetition_penalty for p in params], np.float32),
        put([p.presence_penalty for p in params], np.float32),
        put([p.frequency_penalty for p in params], np.float32),
    )


def _bias(logits: Tensor, biases: dict[tuple[int, int], float]) -> None:
    put = _putter(logits.device)
    bias_logits(
        logits,
        put([token_id for _, token_id in biases], np.int32),
        put([row for row, _ in biases], np.int32),
        put(list(biases.values()), np.float32),
    )


def _mask(logits: Tensor, guided: list[tuple[int, Sequence]], on_error: OnError) -> None:
    bits = np.full((logits.shape[0], -(-logits.shape[1] // 32)), -1, np.int32)
    for row, sequence in guided:
        if sequence.guide is None or sequence.finish_reason is not None:
            continue  # the guide of another output of its request has just failed
        try:
            sequence.guide.fill(bits[row])
        except Exception as error:  # whatever it is, it concerns this sequence alone
            on_error(sequence, error)
    mask_logits(logits, Tensor.from_numpy(bits).to(logits.device))


def _putter(device: Device) -> Callable[[Any, type], Tensor]:
    return lambda values, dtype: Tensor.from_numpy(np.asarray(values, dtype)).to(device)
