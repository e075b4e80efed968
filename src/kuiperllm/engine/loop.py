"""Step after step: what the engine, the benchmark and whoever else runs a model have in common."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kuiperllm.engine.runner import Launched, Read, Runner
from kuiperllm.engine.sampler import Sampler
from kuiperllm.engine.scheduler import Scheduler
from kuiperllm.engine.sequence import Sequence, TokenLogprobs


class Listener(Protocol):
    """Who is told what steps make. It sets `finish_reason` when a sequence ends, and tells the scheduler."""

    def on_token(self, sequence: Sequence, token_id: int) -> None:
        """A sequence has got a token, which is the last of its `output_ids`."""

    def on_embedding(self, sequence: Sequence, hidden: NDArray[np.float32]) -> None:
        """The last hidden state, [D], of a sequence that is only embedded."""

    def on_guide_error(self, sequence: Sequence, error: Exception) -> None:
        """A sequence's guide has failed; whatever token it gets now does not count."""


class StepLoop:
    """Schedules, runs and samples.

    A GPU works on one step while the host looks at the tokens of the one before: the next step is queued
    before these are known. Where the host has a part in choosing, it comes in between: the network runs, the
    tokens of the step before are looked at, and then the logits are bent and the choice is queued. If a
    sequence turns out to have ended, what the step ahead made for it is dropped.

    Args:
        scheduler: decides what each step works on.
        runner: runs it.
        sampler: bends logits where requests ask for it.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, sampler: Sampler) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.num_steps = 0
        self._under_way: Launched | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self.scheduler.running or self.scheduler.num_waiting or self._under_way is not None)

    def step(self, listener: Listener) -> None:
        """Queue a step, and take in the tokens of one: of this one on the host, else of the one before."""
        launched, is_host = self._launch(), self.runner.model.device.is_host
        if self._under_way is not None:
            self._collect(self._under_way, listener)
        if launched is not None and not launched.is_complete:
            self._choose(launched, listener)
        if is_host and launched is not None:
            self._collect(launched, listener)
        self._under_way = None if is_host else launched

    def reset(self) -> None:
        """Give up all sequences, also after an exception at any place. The cache keeps the blocks it has."""
        self._under_way = None
        self.runner.reset()
        self.scheduler.clear(self.runner.cache.num_blocks)

    def _launch(self) -> Launched | None:
        step = self.scheduler.schedule()
        if step is None:
            return None
        self.num_steps += 1
        for sequence in step.changed:
            sequence.began = sequence.began or time.perf_counter()
        chooses = not any(
            sequence.num_tokens <= sequence.bent_until or sequence.num_logprobs is not None
            for sequence in step.sequences[: step.num_sampled]
        )
        return self.runner.launch(step, self.scheduler.pool.num_blocks, chooses=chooses)

    def _choose(self, launched: Launched, listener: Listener) -> None:
        """Bend logits and choose from them; the tokens of all earlier steps are known."""
        logits, sequences = launched.logits, launched.step.sequences[: launched.step.num_sampled]
        if logits is None:
            self.runner.choose(launched)
            return
        asked = [s.num_logprobs for s in sequences if s.num_logprobs is not None]
        own = logits.clone() if asked and any(sequence.is_bent for sequence in sequences) else None
        self.sampler.bend(logits, sequences, listener.on_guide_error)
        self.runner.choose(launched, max(asked, default=None), own)

    def _collect(self, launched: Launched, listener: Listener) -> None:
        """Wait for a step, and hand out what it made."""
        tokens = self.runner.wait(launched)
        sampled = launched.step.sequences[: len(tokens)]
        for sequence, place, reads in launched.prompt_logprobs:
            of_prompt = sequence.prompt_ids[place:]
            entries = _entries(of_prompt, reads, [sequence.params.prompt_logprobs] * len(of_prompt))
            sequence.prompt_logprobs[place:] = entries  # a second time, if a preemption undid the first
        if launched.logprobs:
            found = _entries(tokens, launched.logprobs, [sequence.num_logprobs for sequence in sampled])
            for sequence, entry in zip(sampled, found, strict=True):
                if entry is not None and sequence.finish_reason is None:
                    sequence.logprobs.append(entry)
        on_token = listener.on_token
        for sequence, token_id in zip(sampled, tokens, strict=True):
            sequence.num_pending -= 1
            if sequence.finish_reason is None:
                sequence.output_ids.append(token_id)
                on_token(sequence, token_id)
        for sequence, read in launched.embeddings:
            hidden = read().astype(np.float32)
            if sequence.finish_reason is None:
                listener.on_embedding(sequence, hidden[0])


def _entries(token_ids: list[int], reads: list[Read], counts: list[int | None]) -> list[TokenLogprobs | None]:
    """What was found out about tokens, with so many of the most likely ones; None where nothing was asked."""
    chosen, top_ids, top_values = (read().tolist() for read in reads)
    return [
        None
        if count is None
        else TokenLogprobs(token_id, own, tuple(zip(ids[:count], values[:count], strict=True)))
        for token_id, own, ids, values, count in zip(
            token_ids, chosen, top_ids, top_values, counts, strict=False
        )
    ]
