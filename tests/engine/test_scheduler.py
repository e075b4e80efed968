"""Scheduler and block pool under random loads."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.config import SamplingParams
from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.scheduler import Scheduler, Step
from kuiperllm.engine.sequence import Sequence
from kuiperllm.errors import OutOfMemoryError

BLOCK = 16


@dataclass
class Arrival:
    """A sequence that arrives before a step and, maybe, is given up by its user after some tokens."""

    prompt: int
    output: int
    at: int
    abort_after: int | None


@dataclass
class Load:
    arrivals: list[Arrival]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_blocks: int
    sequences: list[Sequence] = field(default_factory=list)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    arrivals = draw(
        st.lists(
            st.builds(
                Arrival,
                prompt=st.integers(1, 80),
                output=st.integers(1, 40),
                at=st.integers(0, 30),
                abort_after=st.none() | st.integers(0, 20),
            ),
            min_size=1,
            max_size=12,
        )
    )
    longest = max(-(-(a.prompt + a.output) // BLOCK) for a in arrivals)
    return Load(
        sorted(arrivals, key=lambda arrival: arrival.at),
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(1, 60)),
        max_blocks=draw(st.integers(longest, 4 * longest)),
    )


def check_blocks(pool: BlockPool, sequences: list[Sequence]) -> None:
    """Every block that exists is free or belongs to one sequence."""
    held = [block for sequence in sequences for block in sequence.blocks]
    assert sorted(held + pool._free) == list(range(pool.num_blocks))
    assert pool.num_blocks <= pool.max_blocks
    assert pool.num_free == pool.max_blocks - len(held)


def run_step(step: Step, load: Load) -> list[Sequence]:
    """What runner and sampler do to the sequences of a step; those that got a token."""
    assert 1 <= len(step.sequences) <= load.max_num_seqs
    assert 1 <= step.num_tokens <= load.max_num_batched_tokens
    assert len(step.sequences) == 1 or step.is_decode
    for sequence in step.sequences:
        assert sequence.num_computed + step.num_tokens <= sequence.num_tokens
        assert len(sequence.blocks) * BLOCK >= sequence.num_computed + step.num_tokens
        sequence.num_computed += step.num_tokens
    extended = [s for s in step.sequences if s.num_computed == s.num_tokens]
    for sequence in extended:
        sequence.output_ids.append(7)
    return extended


@settings(max_examples=150, deadline=None)
@given(load=loads())
def test_random_loads(load: Load) -> None:
    pool = BlockPool(BLOCK, load.max_blocks)
    scheduler = Scheduler(
        pool, max_num_seqs=load.max_num_seqs, max_num_batched_tokens=load.max_num_batched_tokens
    )
    arrivals = list(load.arrivals)
    plans: dict[int, Arrival] = {}
    begun: list[int] = []
    live: list[Sequence] = []
    finished = steps = 0
    while arrivals or live:
        while arrivals and arrivals[0].at <= steps:
            plan = arrivals.pop(0)
            sequence = Sequence([1] * plan.prompt, SamplingParams(), seed=0, max_tokens=plan.output)
            plans[sequence.number] = plan
            live.append(sequence)
            scheduler.add(sequence)
        step = scheduler.schedule()
        steps += 1
        assert steps < 5000
        assert (step is None) == (not live)  # there is always something to do while anyone waits
        assert len(scheduler.running) <= load.max_num_seqs
        if step is None:
            continue
        begun += [s.number for s in step.sequences if s.number not in begun]
        check_blocks(pool, live)
        extended = run_step(step, load)
        for sequence in list(live):
            plan = plans[sequence.number]
            done = sequence in extended and len(sequence.output_ids) == plan.output
            if done or (plan.abort_after is not None and steps > plan.at + plan.abort_after):
                scheduler.finish(sequence)
                live.remove(sequence)
                finished += 1
                assert sequence.blocks == []
        check_blocks(pool, live)
    assert finished == len(load.arrivals)
    assert begun == sorted(begun)  # numbers grow in the order of arrival
    assert pool.num_free == pool.max_blocks
    assert scheduler.schedule() is None


def test_prompts_go_before_decoding_and_decoding_is_one_batch() -> None:
    scheduler = Scheduler(BlockPool(BLOCK, 100), max_num_seqs=4, max_num_batched_tokens=8)
    first, second = (Sequence([1] * n, SamplingParams(), seed=0, max_tokens=5) for n in (10, 3))
    load = Load([], 4, 8, 100)
    sizes = []
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(5):
        step = scheduler.schedule()
        assert step is not None
        sizes.append(([s.number - first.number for s in step.sequences], step.num_tokens))
        run_step(step, load)
    assert sizes == [([0], 8), ([0], 2), ([1], 3), ([0, 1], 1), ([0, 1], 1)]


def test_a_sequence_waits_until_its_longest_form_fits() -> None:
    scheduler = Scheduler(BlockPool(BLOCK, 4), max_num_seqs=4, max_num_batched_tokens=64)
    first, second = (Sequence([1] * 20, SamplingParams(), seed=0, max_tokens=20) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    assert (scheduler.running, list(scheduler.waiting)) == ([first], [second])  # 3 + 3 blocks of 4
    scheduler.finish(first)
    scheduler.schedule()
    assert scheduler.running == [second]


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 60))
def test_the_pool_gives_each_block_once(counts: list[int], max_blocks: int) -> None:
    pool = BlockPool(BLOCK, max_blocks)
    held: list[list[int]] = []
    for index, count in enumerate(counts):
        taken = sum(len(blocks) for blocks in held)
        if taken + count > max_blocks:
            with pytest.raises(OutOfMemoryError, match=f"cache of {max_blocks} blocks is full"):
                pool.allocate(count)
        else:
            held.append(pool.allocate(count))
        if index % 3 == 2 and held:
            pool.free(held.pop(index % len(held)))
        out = [block for blocks in held for block in blocks]
        assert sorted(out + pool._free) == list(range(pool.num_blocks))
        assert pool.num_blocks <= max_blocks


def test_clearing_takes_all_blocks_back() -> None:
    pool = BlockPool(BLOCK, 100)
    scheduler = Scheduler(pool, max_num_seqs=1, max_num_batched_tokens=500)
    for _ in range(2):
        scheduler.add(Sequence([1] * 300, SamplingParams(), seed=0, max_tokens=20))
    scheduler.schedule()
    assert pool.num_blocks == 19
    scheduler.clear(16)
    assert (scheduler.running, list(scheduler.waiting)) == ([], [])
    assert (pool.num_blocks, pool.num_free) == (16, 100)
    assert sorted(pool.allocate(16)) == list(range(16))
