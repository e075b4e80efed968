"""The scheduler under random loads, with a cache that knows what should be in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.config import SamplingParams
from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.scheduler import Scheduler, Step
from kuiperllm.engine.sequence import Sequence

BLOCK = 4


def new(prompt: Iterable[int], max_tokens: int, **options: Any) -> Sequence:
    return Sequence(list(prompt), SamplingParams(), seed=0, max_tokens=max_tokens, **options)


@dataclass
class Device:
    """Stands for the model: what follows a text depends on all of it, as far as the cache holds it.

    A cached token is the text up to it, so that reading a block that holds something else is found out.
    """

    cache: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    texts: dict[int, list[int]] = field(default_factory=dict)
    """Of each sequence, by number, all tokens: also those that the scheduler does not know yet."""

    def run(self, step: Step) -> list[int]:
        """Do a step; the token of each sampled sequence."""
        pieces = list(zip(step.sequences, step.starts, step.num_tokens, strict=True))
        written = set()
        for sequence, start, count in pieces:
            text = self.texts.setdefault(sequence.number, list(sequence.prompt_ids))
            for place in range(start, start + count):
                slot = sequence.blocks[place // BLOCK], place % BLOCK
                assert slot not in written, "two tokens go to the same place"
                written.add(slot)
                self.cache[slot] = tuple(text[: place + 1])
        for sequence, start, count in pieces:
            text = self.texts[sequence.number]
            for place in range(start + count):
                slot = sequence.blocks[place // BLOCK], place % BLOCK
                assert self.cache[slot] == tuple(text[: place + 1]), "the cache holds another text"
                if max(step.num_tokens) == 1 and place < start:
                    assert slot not in written, "a kernel for single tokens reads what another one writes"
        tokens = []
        for sequence in step.sequences[: step.num_sampled]:
            text = self.texts[sequence.number]
            tokens.append(following(text))
            text.append(tokens[-1])
        return tokens


def following(text: list[int]) -> int:
    return hash(tuple(text)) % 2


def alone(sequence: Sequence) -> list[int]:
    """What a sequence gets if nobody else is there."""
    text = list(sequence.prompt_ids)
    for _ in range(sequence.max_tokens):
        text.append(following(text))
    return text[len(sequence.prompt_ids) :]


@dataclass
class Arrival:
    """A sequence that arrives before a step and, maybe, is given up by its user some steps later."""

    at: int
    prompt: list[int]
    output: int
    priority: int
    salt: str
    embeds: bool
    abort_after: int | None
    stop_after: int


ARRIVALS = st.builds(
    Arrival,
    at=st.integers(0, 30),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30)
    | st.integers(1, 30).map(lambda n: [1] * n),  # many begin alike
    output=st.integers(1, 20),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    salt=st.sampled_from(["", "", "", "x"]),
    embeds=st.sampled_from([False] * 7 + [True]),
    abort_after=st.sampled_from([None, None, None, 0, 1, 3, 10]),
    stop_after=st.integers(1, 25),
)


@dataclass
class Load:
    arrivals: list[Arrival]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_blocks: int
    looks_ahead: bool


@st.composite
def loads(draw: st.DrawFn) -> Load:
    arrivals = draw(st.lists(ARRIVALS, min_size=1, max_size=10))
    longest = max(-(-(len(a.prompt) + a.output) // BLOCK) for a in arrivals)
    return Load(
        sorted(arrivals, key=lambda arrival: arrival.at),
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        max_blocks=draw(st.integers(longest, 3 * longest)),
        looks_ahead=draw(st.booleans()),
    )


class Simulation:
    """What the engine does with a scheduler, step by step."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.pool = BlockPool(BLOCK, load.max_blocks, first_blocks=2)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=load.max_num_seqs, max_num_batched_tokens=load.max_num_batched_tokens
        )
        self.device = Device()
        self.live: dict[Sequence, Arrival] = {}
        self.under_way: tuple[Step, list[int]] | None = None
        self.num_steps = self.num_ended = 0

    def run(self) -> None:
        arrivals = list(self.load.arrivals)
        while arrivals or self.live or self.under_way:
            while arrivals and arrivals[0].at <= self.num_steps:
                self.add(arrivals.pop(0))
            self.step()
            self.num_steps += 1
            assert self.num_steps < 5000
        assert self.num_ended == len(self.load.arrivals)
        assert self.scheduler.schedule() is None
        assert self.pool.num_free == self.pool.max_blocks
        assert sorted(self.scheduler._rows) == list(range(self.load.max_num_seqs))

    def add(self, arrival: Arrival) -> None:
        sequence = new(
            arrival.prompt,
            1 if arrival.embeds else arrival.output,
            priority=arrival.priority,
            cache_salt=arrival.salt,
            embeds=arrival.embeds,
        )
        self.live[sequence] = arrival
        self.scheduler.add(sequence)

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert step is not None or self.under_way or not self.live  # nobody waits for nothing
        launched = None
        if step is not None:
            self.check(step)
            launched = step, self.device.run(step)
        if self.load.looks_ahead:
            self.under_way, launched = launched, self.under_way
        if launched is not None:
            self.collect(*launched)
        for sequence, arrival in list(self.live.items()):
            if arrival.abort_after is not None and self.num_steps >= arrival.at + arrival.abort_after:
                self.end(sequence)
        self.check_blocks()

    def check(self, step: Step) -> None:
        load, counts = self.load, step.num_tokens
        assert 1 <= len(step.sequences) <= load.max_num_seqs
        assert len({s.row for s in step.sequences} & set(range(load.max_num_seqs))) == len(step.sequences)
        assert all(count >= 1 for count in counts)
        prompts = sum(counts) - sum(1 for count in counts[: step.num_single] if count == 1)
        assert prompts <= max(1, load.max_num_batched_tokens)
        assert set(counts[: step.num_single]) <= {1}
        assert all(count > 1 for count in counts[step.num_single : step.num_sampled])
        for index, (sequence, start) in enumerate(zip(step.sequences, step.starts, strict=True)):
            is_sampled = index < step.num_sampled
            assert start + counts[index] == sequence.num_computed
            if is_sampled:
                assert sequence.num_computed == sequence.num_tokens - 1
            else:
                assert sequence.num_computed < sequence.num_tokens or sequence.embeds
            assert sequence.num_tokens <= sequence.limit

    def collect(self, step: Step, tokens: list[int]) -> None:
        for sequence, token in zip(step.sequences[: step.num_sampled], tokens, strict=True):
            sequence.num_pending -= 1
            if sequence.finish_reason is None:
                sequence.output_ids.append(token)
                done = len(sequence.output_ids)
                if done == sequence.max_tokens or done == self.live[sequence].stop_after:
                    assert sequence.output_ids == alone(sequence)[:done]
                    self.end(sequence)
        for sequence in step.sequences[step.num_sampled :]:
            if sequence.embeds and sequence in self.live and sequence.num_computed == sequence.num_tokens:
                self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        sequence.finish_reason = "stop"
        self.scheduler.finish(sequence)
        del self.live[sequence]
        self.num_ended += 1
        assert (sequence.blocks, sequence.row) == ([], -1)

    def check_blocks(self) -> None:
        """Every block that exists is free or belongs to sequences, as many as are counted."""
        users = [0] * self.pool.num_blocks
        for sequence in self.live:
            for block in sequence.blocks:
                users[block] += 1
        assert users == self.pool._users
        assert self.pool.num_free == self.pool.max_blocks - sum(1 for count in users if count)


@settings(max_examples=300, deadline=None)
@given(load=loads())
def test_random_loads(load: Load) -> None:
    Simulation(load).run()


# --- what it decides --------------------------------------------------------------------------------------


def scheduled(scheduler: Scheduler, device: Device | None = None) -> list[tuple[int, int]]:
    """(prompt length, tokens) of each sequence of the next step, whose tokens are then known at once."""
    step = scheduler.schedule()
    assert step is not None
    tokens = (device or Device()).run(step) if device else [7] * step.num_sampled
    for sequence, token in zip(step.sequences, tokens, strict=False):
        sequence.num_pending -= 1
        sequence.output_ids.append(token)
    return [(len(s.prompt_ids), count) for s, count in zip(step.sequences, step.num_tokens, strict=True)]


def scheduler_of(max_blocks: int, max_num_seqs: int = 4, max_num_batched_tokens: int = 100) -> Scheduler:
    pool = BlockPool(BLOCK, max_blocks)
    return Scheduler(pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def test_decoding_goes_on_while_prompts_are_taken_in_piece_by_piece() -> None:
    scheduler = scheduler_of(100, max_num_batched_tokens=8)
    for length in (10, 3, 20):
        scheduler.add(new([length] * length, 10))
    assert [scheduled(scheduler) for _ in range(5)] == [
        [(10, 8)],
        [(10, 2), (3, 3), (20, 3)],
        [(10, 1), (3, 1), (20, 6)],
        [(10, 1), (3, 1), (20, 6)],
        [(10, 1), (3, 1), (20, 5)],
    ]
    assert scheduled(scheduler) == [(10, 1), (3, 1), (20, 1)]


def test_more_urgent_requests_go_first() -> None:
    scheduler = scheduler_of(100, max_num_seqs=2)
    for length, priority in ((5, 1), (6, 0), (7, 0)):
        scheduler.add(new([length] * length, 2, priority=priority))
    assert scheduled(scheduler) == [(6, 6), (7, 7)]


def test_an_urgent_request_takes_the_place_of_another_which_comes_back() -> None:
    scheduler, device = scheduler_of(100, max_num_seqs=2), Device()
    patient = [new([length] * length, 20, priority=5) for length in (9, 10)]
    for sequence in patient:
        scheduler.add(sequence)
    scheduled(scheduler, device)
    urgent = new(range(100, 106), 1)
    scheduler.add(urgent)
    assert scheduled(scheduler, device) == [(9, 1), (6, 6)]
    assert scheduler.num_preemptions == 1
    scheduler.finish(urgent)
    # Two blocks of its prompt are still there; what is left of the prompt, and its token, are computed anew.
    assert scheduled(scheduler, device) == [(9, 1), (10, 3)]
    assert patient[1].output_ids == alone(patient[1])[:2]


def test_the_last_to_come_gives_way_when_blocks_run_out() -> None:
    scheduler = scheduler_of(6)
    first, second = new([1] * 8, 12), new([2] * 9, 12)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduled(scheduler) == [(8, 8), (9, 9)]  # 2 and 3 blocks
    for _ in range(3):
        assert scheduled(scheduler) == [(8, 1), (9, 1)]
    assert scheduled(scheduler) == [(8, 1)]  # the second would need a fourth
    assert (second.row, second.num_computed, second.blocks, len(second.output_ids)) == (-1, 0, [], 4)
    assert (scheduler.num_waiting, scheduler.num_preemptions) == (1, 1)
    assert scheduled(scheduler) == [(8, 1)]  # takes the last of the blocks that were given up
    scheduler.finish(first)
    assert scheduled(scheduler) == [(9, 13 - 2 * BLOCK)]


def test_a_prompt_waits_until_there_are_blocks_for_all_of_it() -> None:
    scheduler = scheduler_of(6)
    first, second = new([1] * 8, 4), new([2] * 16, 4)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.add(new([3], 1))  # does not overtake
    assert scheduled(scheduler) == [(8, 8)]
    scheduler.finish(first)
    assert scheduled(scheduler) == [(1, 1), (16, 16)]


def test_prompts_that_begin_alike_share_blocks_even_in_one_step() -> None:
    scheduler = scheduler_of(100)
    prompt = list(range(18))
    sequences = [new([*prompt, 50 + index], 3) for index in range(3)]
    for sequence in (*sequences, new([*prompt, 60], 3, cache_salt="x")):
        scheduler.add(sequence)
    assert scheduled(scheduler) == [(19, 19), (19, 3), (19, 3), (19, 19)]
    assert [sequence.num_cached for sequence in sequences] == [0, 16, 16]
    assert (scheduler.num_queried, scheduler.num_found) == (4 * 19, 32)
    assert scheduler.pool.num_used == 5 + 1 + 1 + 5


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = scheduler_of(100)
    for _ in range(2):
        sequence = new(range(16), 1)
        scheduler.add(sequence)
        scheduled(scheduler)
        scheduler.finish(sequence)
    assert sequence.num_cached == 12


def test_what_was_generated_is_found_as_the_beginning_of_the_next_prompt() -> None:
    scheduler, device = scheduler_of(100), Device()
    sequence = new(range(10, 16), 12)
    scheduler.add(sequence)
    for _ in range(12):
        scheduled(scheduler, device)
    scheduler.finish(sequence)
    following_turn = new([*range(10, 16), *sequence.output_ids, 5, 5], 1)
    scheduler.add(following_turn)
    scheduled(scheduler, device)
    assert following_turn.num_cached == 16  # of 6 + 12, the last of which was never put into the cache


def test_prompts_that_are_reported_on_are_computed_in_full() -> None:
    scheduler = scheduler_of(100)
    scheduler.add(new(range(10), 1))
    scheduler.add(Sequence(list(range(10)), SamplingParams(prompt_logprobs=0), seed=0, max_tokens=1))
    assert scheduled(scheduler) == [(10, 10), (10, 10)]


def test_giving_up_at_any_time() -> None:
    scheduler = scheduler_of(6, max_num_seqs=2, max_num_batched_tokens=4)
    running, prefilling, waiting = (new([index] * 8, 5) for index in range(3))
    for sequence in (running, prefilling, waiting):
        scheduler.add(sequence)
    for _ in range(3):
        scheduled(scheduler)
    assert (running.num_computed, prefilling.num_computed, waiting.row) == (9, 3, -1)
    for sequence in (prefilling, waiting, running, running):
        scheduler.finish(sequence)
    assert scheduler.pool.num_free == 6
    assert scheduler.schedule() is None


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_clearing_takes_everything_back(num_blocks: int) -> None:
    scheduler = scheduler_of(100, max_num_seqs=1)
    for _ in range(2):
        scheduler.add(new(range(30), 20))
    scheduled(scheduler)
    scheduler.clear(num_blocks)
    assert (scheduler.running, scheduler.num_waiting) == ([], 0)
    assert (scheduler.pool.num_blocks, scheduler.pool.num_free) == (num_blocks, 100)
    sequence = new(range(30), 1)
    scheduler.add(sequence)
    assert scheduled(scheduler) == [(30, 30)]
    assert sequence.num_cached == 0
