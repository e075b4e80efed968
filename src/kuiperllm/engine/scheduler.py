"""Decides which sequences the next pass works on. It knows integers only."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass works on: the next token of several sequences, or a piece of one prompt."""

    sequences: list[Sequence]
    num_tokens: int
    """Tokens of each sequence: 1 to decode, more for a piece of a prompt."""

    @property
    def is_decode(self) -> bool:
        """Whether every sequence only needs its newest token processed."""
        return all(sequence.is_prefilled for sequence in self.sequences)


class Scheduler:
    """First come, first served. Prompts go before decoding, so that new ones join the others soon.

    Args:
        pool: the blocks of the key/value cache.
        max_num_seqs: most sequences that are worked on at once.
        max_num_batched_tokens: most tokens of a prompt that one pass takes in.
    """

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> Step | None:
        """The next pass, with cache blocks for its tokens allotted; None if there is nothing to do."""
        while self.waiting and self._admits(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        for sequence in self.running:
            if not sequence.is_prefilled:
                left = sequence.num_tokens - sequence.num_computed
                return self._step([sequence], min(left, self.max_num_batched_tokens))
        return self._step(list(self.running), 1) if self.running else None

    def schedule_ahead(self, step: Step) -> Step | None:
        """The pass after a decode pass whose tokens are not known yet; None if it depends on them.

        It may do work for sequences that turn out to have ended with those tokens.
        """
        if not step.is_decode or step.sequences != self.running:
            return None
        if self.waiting and self._admits(self.waiting[0]):
            return None
        if any(len(sequence.output_ids) + 1 >= sequence.max_tokens for sequence in step.sequences):
            return None
        return self._step(step.sequences, 1)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state, and take its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.free(sequence.blocks)
        sequence.blocks = []

    def clear(self, num_blocks: int) -> None:
        """Forget all sequences; the pool goes on with `num_blocks` blocks."""
        self.waiting.clear()
        self.running.clear()
        self.pool.reset(num_blocks)

    def _admits(self, sequence: Sequence) -> bool:
        """Whether the blocks suffice for all running sequences and this one at their longest."""
        if len(self.running) >= self.max_num_seqs:
            return False
        needed = sum(self._most_blocks(other) for other in (*self.running, sequence))
        return needed <= self.pool.max_blocks

    def _most_blocks(self, sequence: Sequence) -> int:
        return self.pool.blocks_for(len(sequence.prompt_ids) + sequence.max_tokens)

    def _step(self, sequences: list[Sequence], num_tokens: int) -> Step:
        for sequence in sequences:
            missing = self.pool.blocks_for(sequence.num_computed + num_tokens) - len(sequence.blocks)
            sequence.blocks.extend(self.pool.allocate(missing))
        return Step(sequences, num_tokens)
