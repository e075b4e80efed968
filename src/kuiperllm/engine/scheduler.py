"""Decides which sequences the next pass works on, and with how many tokens. It knows integers only."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Step:
    """What one pass works on: some tokens of each of several sequences.

    First come sequences with a single token that will get another one, then others that will get one, then
    those that get none: pieces of prompts that end in the middle, and prompts that are only embedded.
    """

    sequences: list[Sequence]
    num_tokens: list[int]
    """Tokens of each sequence in this pass."""
    starts: list[int]
    """Place of the first of them in the sequence."""
    num_single: int
    """How many sequences the first kind has."""
    num_sampled: int
    """How many the first two have."""
    changed: list[Sequence] = field(default_factory=list)
    """Those that have other blocks than in the last pass, or have just come."""

    @property
    def is_decode(self) -> bool:
        """Whether all sequences are of the first kind."""
        return self.num_single == len(self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, as far as this pass takes it."""
        if self.is_decode:
            return max(self.starts) + 1
        return max(start + count for start, count in zip(self.starts, self.num_tokens, strict=True))


class Scheduler:
    """Continuous batching with chunked prefill.

    Every pass takes one token of each sequence that decodes, and fills up with pieces of prompts. A prompt is
    admitted when the cache has blocks for all of it; blocks for what it generates are taken one by one. When
    there are none left, the least urgent sequence gives all of its own up and is computed anew later. A
    waiting sequence takes the place of running ones whose priority is worse than its own.

    `schedule` may be called before the tokens of the last pass are known: it counts them as there.

    Args:
        pool: the blocks of the key/value cache.
        max_num_seqs: most sequences that are worked on at once.
        max_num_batched_tokens: most tokens that a pass takes in; what decodes goes on even beyond that.
    """

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_queried = 0
        """Tokens of sequences that began, which were looked up in the prefix cache."""
        self.num_found = 0
        """Those that were found."""
        self._waiting: list[Sequence] = []  # the most urgent one last
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._changed: list[Sequence] = []
        self._refused: tuple[Sequence | None, int] = None, 0
        """What was waiting for blocks when it was last looked at, and how many were free then."""

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn, preempted ones included."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        insort(self._waiting, sequence, key=_patience)

    def schedule(self) -> Step | None:
        """The next pass, with cache blocks for its tokens allotted; None if there is nothing to do now."""
        self._changed = []
        self._give_way()
        decoding, prompts = self._continued()
        budget = max(1, self.max_num_batched_tokens - len(decoding))
        pieces: list[tuple[Sequence, int]] = []
        for sequence in prompts:
            budget -= self._take_piece(sequence, budget, pieces)
        while budget > 0 and (admitted := self._admit()) is not None:
            budget -= self._take_piece(admitted, budget, pieces)
        return self._step(decoding, pieces) if decoding or pieces else None

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state, and take its blocks back."""
        if sequence.row >= 0:
            self._stop(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def clear(self, num_blocks: int) -> None:
        """Forget all sequences; the pool goes on with `num_blocks` blocks."""
        self.running.clear()
        self._waiting.clear()
        self._rows = list(range(self.max_num_seqs - 1, -1, -1))
        self.pool.reset(num_blocks)

    # --- sequences that run -------------------------------------------------------------------------------

    def _continued(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that miss one token in the cache, with a block for it; those that miss more."""
        decoding, prompts = [], []
        size, before = self.pool.block_size, self.num_preemptions
        for sequence in list(self.running):
            missing = sequence.num_tokens - sequence.num_computed
            if missing > 1 or sequence.embeds:
                prompts.append(sequence)
            elif not missing or sequence.num_tokens == sequence.limit:
                continue  # its last token is under way
            elif sequence.num_computed < size * len(sequence.blocks) or self._grow(sequence):
                decoding.append(sequence)
        if self.num_preemptions != before:
            decoding = [sequence for sequence in decoding if sequence.row >= 0]
            prompts = [sequence for sequence in prompts if sequence.row >= 0]
        return decoding, prompts

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence one more block, at the cost of others if need be; whether it still runs."""
        while sequence.row >= 0 and not self.pool.num_free:
            self._preempt(max(self.running, key=_urgency))
        if sequence.row < 0:
            return False
        self._remember(sequence)
        sequence.blocks += self.pool.allocate(1)
        self._changed.append(sequence)
        return True

    def _give_way(self) -> None:
        """Stop running sequences of worse priority than a waiting one that has no room."""
        while self._waiting and self.running:
            first, last = self._waiting[-1], max(self.running, key=_urgency)
            if last.priority <= first.priority or first.num_pending:
                return
            if (
                self._rows
                and self.pool.blocks_for(first.num_tokens) + len(self.running) <= self.pool.num_free
            ):
                return
            self._preempt(last)

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence; it keeps its output and waits to be computed anew."""
        self._stop(sequence)
        self.add(sequence)
        self.num_preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self._remember(sequence)
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        self._rows.append(sequence.row)
        sequence.row, sequence.blocks, sequence.num_computed, sequence.num_remembered = -1, [], 0, 0

    def _remember(self, sequence: Sequence) -> None:
        """Let others share the blocks that are full of known tokens."""
        size = self.pool.block_size
        full = min(sequence.num_computed, sequence.num_known) // size
        for index in range(sequence.num_remembered, full):
            tokens = sequence.token_bytes(index * size, size)
            sequence.place = self.pool.remember(sequence.blocks[index], sequence.place, tokens)
        sequence.num_remembered = max(full, sequence.num_remembered)

    # --- sequences that wait ------------------------------------------------------------------------------

    def _admit(self) -> Sequence | None:
        """Let the most urgent waiting sequence run, if there is room for all that is known of it."""
        sequence = self._waiting[-1] if self._waiting else None
        if sequence is None or not self._rows or sequence.num_pending:  # its newest token is under way
            return None
        pool, tokens = self.pool, sequence.num_tokens
        before, free = self._refused
        if self.running and before is sequence and pool.num_free <= free:
            return None
        # The last token is always computed: what follows it has to be known.
        most = 0 if sequence.wants_prompt_logprobs else (tokens - 1) // pool.block_size
        cached, place = pool.match(sequence.cache_salt, sequence.token_bytes(0, most * pool.block_size), most)
        missing = pool.blocks_for(tokens) - len(cached)
        if self.running and missing + len(self.running) > pool.num_free:  # those will soon need one each
            pool.release(cached)
            self._refused = sequence, pool.num_free
            return None
        sequence.blocks = cached + pool.allocate(missing)
        sequence.place, sequence.num_remembered = place, len(cached)
        sequence.num_computed = len(cached) * pool.block_size
        if not sequence.output_ids:
            sequence.num_cached = sequence.num_computed
            self.num_queried += tokens
            self.num_found += sequence.num_computed
        self._waiting.pop()
        self.running.append(sequence)
        sequence.row = self._rows.pop()
        self._changed.append(sequence)
        return sequence

    # --- the step -----------------------------------------------------------------------------------------

    def _take_piece(self, sequence: Sequence, most: int, pieces: list[tuple[Sequence, int]]) -> int:
        """Add a piece of a prompt of at most so many tokens; how many it has."""
        count = min(sequence.num_tokens - sequence.num_computed, most)
        if count:
            pieces.append((sequence, count))
            sequence.num_computed += count
            if count > 1:
                # What is admitted from now on may share these blocks, even in this pass: a pass with several
                # tokens of one sequence writes all keys and values of a layer before it reads any.
                self._remember(sequence)
        return count

    def _step(self, decoding: list[Sequence], pieces: list[tuple[Sequence, int]]) -> Step:
        single, several, partial = decoding, [], []
        for sequence in decoding:
            sequence.num_computed += 1
        for sequence, count in pieces:
            if sequence.num_computed < sequence.num_tokens or sequence.embeds:
                partial.append((sequence, count))
            elif count == 1:
                single.append(sequence)
            else:
                several.append((sequence, count))
        sequences, counts = list(single), [1] * len(single)
        for sequence, count in (*several, *partial):
            sequences.append(sequence)
            counts.append(count)
        starts = [s.num_computed - count for s, count in zip(sequences, counts, strict=True)]
        num_sampled = len(single) + len(several)
        for sequence in sequences[:num_sampled]:
            sequence.num_tokens += 1
            sequence.num_pending += 1
        changed = [sequence for sequence in self._changed if sequence.row >= 0]
        return Step(sequences, counts, starts, len(single), num_sampled, changed)


def _urgency(sequence: Sequence) -> tuple[int, int]:
    """Sorts sequences: the most urgent first."""
    return sequence.priority, sequence.number


def _patience(sequence: Sequence) -> tuple[int, int]:
    """Sorts sequences: the most urgent last."""
    return -sequence.priority, -sequence.number
