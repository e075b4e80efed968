"""The caching pool: sizes, reuse, statistics, running out of memory, threads, private pools."""

from __future__ import annotations

import gc
import random
import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.core import Allocator, Buffer, Device
from kuiperllm.core.memory import MemoryInfo, MemorySource, out_of_memory
from kuiperllm.errors import OutOfMemoryError, UsageError

KIB, MIB = 1 << 10, 1 << 20


class FakeSource(MemorySource):
    """Hands out addresses that are never touched, up to a limit, and checks what comes back."""

    alignment = 64
    granularity = 4 * KIB

    def __init__(self, limit: int = 1 << 50) -> None:
        self.limit = limit
        self.next = 1 << 40
        self.live: dict[int, int] = {}

    def reserve(self, nbytes: int) -> int:
        if nbytes > self.info().free_bytes:
            raise out_of_memory("fake", nbytes, self.info())
        address, self.next = self.next, self.next + nbytes + self.granularity
        self.live[address] = nbytes
        return address

    def release(self, address: int, nbytes: int) -> None:
        assert self.live.pop(address) == nbytes

    def info(self) -> MemoryInfo:
        return MemoryInfo(self.limit - sum(self.live.values()), self.limit)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def pool(source: FakeSource) -> Allocator:
    return Allocator(source, Device("cpu"))


def test_freed_block_is_handed_out_again(pool: Allocator) -> None:
    first = pool.allocate(1000)
    address = first.address
    del first
    second = pool.allocate(1010)  # the same size class
    assert second.address == address
    assert pool.allocate(1010).address != address
    assert pool.stats().num_reserves == 1


@pytest.mark.parametrize(
    "nbytes", [1, 63, 64, 65, 512, 513, 1000, 4097, 70_001, MIB - 1, MIB, MIB + 1, 9 * MIB]
)
def test_rounding_wastes_at_most_an_eighth(pool: Allocator, nbytes: int) -> None:
    buffer = pool.allocate(nbytes)
    taken = pool.stats().allocated_bytes
    assert buffer.nbytes == nbytes
    assert buffer.address % 64 == 0
    assert taken % 64 == 0
    assert nbytes <= taken <= max(nbytes * 9 / 8, -(-nbytes // 64) * 64)


def test_large_block_is_reused_for_a_slightly_smaller_request_only(pool: Allocator) -> None:
    address = pool.allocate(9 * MIB).address
    assert pool.allocate(8 * MIB).address == address
    assert pool.allocate(7 * MIB).address != address
    assert pool.allocate(10 * MIB).address != address


def test_best_fit(pool: Allocator) -> None:
    blocks = [pool.allocate(size * MIB) for size in (20, 22, 21)]
    wanted = blocks[2].address
    del blocks
    assert pool.allocate(20 * MIB + 512 * KIB).address == wanted


def test_statistics_follow_and_return_to_the_start(pool: Allocator) -> None:
    start = pool.stats()
    small, large = pool.allocate(640), pool.allocate(2 * MIB)
    stats = pool.stats()
    assert stats.allocated_bytes == stats.peak_allocated_bytes == 640 + 2 * MIB
    assert stats.reserved_bytes == stats.peak_reserved_bytes == 4 * MIB + 2 * MIB
    assert (stats.num_allocations, stats.num_reserves) == (2, 2)
    del small, large
    stats = pool.stats()
    assert stats.allocated_bytes == start.allocated_bytes == 0
    assert stats.peak_allocated_bytes == 640 + 2 * MIB
    pool.reset_peak()
    assert pool.stats().peak_allocated_bytes == 0
    pool.empty_cache()
    assert pool.stats().reserved_bytes == 0
    assert pool.stats().peak_reserved_bytes == 6 * MIB
    pool.reset_peak()
    assert pool.stats().peak_reserved_bytes == 0


def test_peak_is_of_the_live_bytes(pool: Allocator) -> None:
    for _ in range(10):
        pool.allocate(MIB)
    assert pool.stats().peak_allocated_bytes == MIB


def test_empty_cache_keeps_slabs_in_use(pool: Allocator, source: FakeSource) -> None:
    kept = pool.allocate(64)
    dropped = [pool.allocate(512 * KIB) for _ in range(20)]
    assert len(source.live) == 3
    del dropped
    pool.empty_cache()
    assert len(source.live) == 1
    ((address, size),) = source.live.items()
    assert address <= kept.address < address + size
    del kept
    pool.empty_cache()
    assert source.live == {}
    assert pool.allocate(64).address % 64 == 0  # a new slab is started


def test_cache_is_given_back_before_memory_runs_out() -> None:
    source = FakeSource(limit=10 * MIB)
    pool = Allocator(source, Device("cpu"))
    del (cached := [pool.allocate(4 * MIB), pool.allocate(5 * MIB)])[:]
    assert pool.stats().reserved_bytes == 9 * MIB
    kept = pool.allocate(8 * MIB)
    assert cached == []
    assert pool.stats().reserved_bytes == kept.nbytes == 8 * MIB


def test_out_of_memory_says_what_is_needed_and_what_there_is() -> None:
    pool = Allocator(FakeSource(limit=16 << 30), Device("cpu"))
    kept = pool.allocate(10 << 30)
    with pytest.raises(OutOfMemoryError) as caught:
        pool.allocate(12 << 30)
    assert str(caught.value) == (
        "fake memory: needs 12.00 GiB, has 6.00 GiB free of 16.00 GiB; "
        "use a smaller model, quantization or a smaller max_model_len"
    )
    assert pool.stats().allocated_bytes == kept.nbytes
    del kept
    assert pool.allocate(12 << 30).nbytes == 12 << 30  # the failure broke nothing


def test_zero_and_negative_sizes(pool: Allocator) -> None:
    assert pool.allocate(0).nbytes == 0
    assert pool.stats().reserved_bytes == 0
    with pytest.raises(UsageError, match="cannot allocate -1 bytes"):
        pool.allocate(-1)


def test_alignment_of_the_source_is_kept() -> None:
    source = FakeSource()
    source.alignment = 256
    pool = Allocator(source, Device("cpu"))
    assert all(pool.allocate(size).address % 256 == 0 for size in (1, 100, 257, 1000, 5000))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * MIB), st.booleans()), max_size=60), st.randoms())
def test_live_blocks_never_overlap(steps: list[tuple[int, bool]], rng: random.Random) -> None:
    source = FakeSource()
    pool = Allocator(source, Device("cpu"))
    live: list[Buffer] = []
    for nbytes, free_one in steps:
        live.append(pool.allocate(nbytes))
        if free_one:
            live.pop(rng.randrange(len(live)))
    pieces = sorted((b.address, b.address + b.nbytes) for b in live if b.nbytes)
    assert all(end <= start for (_, end), (start, _) in pairwise(pieces))
    for start, end in pieces:
        assert any(base <= start and end <= base + size for base, size in source.live.items())
    pieces.clear()
    live.clear()
    pool.empty_cache()
    assert source.live == {}
    assert pool.stats().reserved_bytes == pool.stats().allocated_bytes == 0


def test_steady_traffic_does_not_grow(pool: Allocator) -> None:
    rng = random.Random(0)
    live: list[Buffer] = []

    def churn() -> None:
        for _ in range(3000):
            live.append(pool.allocate(rng.choice([64, 4096, 100 * KIB, 2 * MIB])))
            if len(live) > 50:
                live.pop(rng.randrange(len(live)))

    churn()
    reserved = pool.stats().reserved_bytes
    churn()
    assert pool.stats().reserved_bytes <= 1.2 * reserved


def test_threads_share_the_pool(pool: Allocator, source: FakeSource) -> None:
    failures: list[str] = []
    taken: dict[int, int] = {}

    def work(seed: int) -> None:
        rng = random.Random(seed)
        live: list[Buffer] = []
        for _ in range(4000):
            buffer = pool.allocate(rng.choice([64, 640, 5000, MIB]))
            # setdefault is atomic: two threads that hold one address would see each other.
            if taken.setdefault(buffer.address, seed) != seed:
                failures.append(f"{buffer.address:#x} was handed out twice")
            live.append(buffer)
            if len(live) > 8:
                gone = live.pop(rng.randrange(len(live)))
                del taken[gone.address]
                gone.release()
        for buffer in live:
            del taken[buffer.address]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pool.stats().allocated_bytes == 0
    assert pool.stats().num_allocations == 24_000
    pool.empty_cache()
    assert source.live == {}


def test_buffers_in_a_cycle_are_freed_by_the_collector(pool: Allocator) -> None:
    cycle: list[object] = [pool.allocate(1000)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.stats().allocated_bytes == 0


def test_private_pool_keeps_what_was_freed_in_it(pool: Allocator) -> None:
    with pool.private_pool() as private:
        temporary = pool.allocate(1000).address
        again = pool.allocate(1000)  # inside, freed memory is reused
        assert again.address == temporary
        kept = pool.allocate(2 * MIB)
        large = kept.address
        del kept, again
    # Outside, nothing may take it while the private pool is held, not even to give it back.
    assert pool.allocate(1000).address != temporary
    assert pool.allocate(2 * MIB).address != large
    pool.empty_cache()
    assert pool.stats().reserved_bytes == 4 * MIB + 2 * MIB
    with pool.private_pool(private):
        assert pool.allocate(1000).address == temporary
        outlives = pool.allocate(2 * MIB)
        assert outlives.address == large
    del private
    pool.empty_cache()
    assert pool.stats().reserved_bytes == 2 * MIB
    del outlives
    assert pool.allocate(2 * MIB).address == large  # it followed into the common pool


def test_private_pool_is_for_its_own_thread(pool: Allocator) -> None:
    common = pool.allocate(1000).address
    seen: list[Buffer] = []
    with pool.private_pool() as private:
        thread = threading.Thread(target=lambda: seen.append(pool.allocate(1000)))
        thread.start()
        thread.join()
        assert private.owns(pool.allocate(1000))
    assert seen[0].address == common
    assert not private.owns(seen[0])


def test_private_pool_takes_over_what_is_free(pool: Allocator) -> None:
    small, large = pool.allocate(1000).address, pool.allocate(2 * MIB).address
    reserved = pool.stats().reserved_bytes
    with pool.private_pool() as private:
        taken = [pool.allocate(1000), pool.allocate(2 * MIB)]
        assert [buffer.address for buffer in taken] == [small, large]
        assert all(private.owns(buffer) for buffer in taken)
    del taken
    assert pool.allocate(1000).address != small  # as long as the pool is held
    pool.empty_cache()
    assert pool.stats().reserved_bytes == reserved
    del private
    assert pool.allocate(2 * MIB).address == large


def test_private_pools_nest_and_end_after_an_error(pool: Allocator) -> None:
    common = pool.allocate(1000).address
    with pool.private_pool(), pytest.raises(ValueError, match="stop"), pool.private_pool():
        raise ValueError("stop")
    assert pool.allocate(1000).address == common
