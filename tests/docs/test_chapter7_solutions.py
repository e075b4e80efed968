"""The solutions of chapter 7: sequences that fork, a simulation of who is next, blocks behind a window."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from kuiperllm.core import DType, Tensor
from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.errors import OutOfMemoryError
from kuiperllm.ops.attention import LayerCache, attention, reference, write_kv
from kuiperllm.ops.attention import paged as paged_cache

Solution = Callable[[str], ModuleType]


def test_exercise1_shares_full_blocks_and_copies_the_last(solution: Solution) -> None:
    pool = solution("chapter7_exercise1").ForkingPool(block_size=4, max_blocks=6)
    first = pool.allocate(3)
    second, copies = pool.fork(first, 10)
    assert second[:2] == first[:2]
    assert copies == [(first[2], second[2])]
    assert pool.num_used == 4
    pool.release(first)
    assert pool.num_used == 3
    pool.release(second)
    assert pool.num_free == 6


def test_exercise1_of_full_blocks_alone(solution: Solution) -> None:
    pool = solution("chapter7_exercise1").ForkingPool(block_size=4, max_blocks=4)
    blocks = pool.allocate(3)  # the last one has no token yet
    assert pool.fork(blocks, 8) == (blocks[:2], [])


def test_exercise1_takes_nothing_where_blocks_are_missing(solution: Solution) -> None:
    pool = solution("chapter7_exercise1").ForkingPool(block_size=4, max_blocks=2)
    blocks = pool.allocate(2)
    with pytest.raises(OutOfMemoryError):
        pool.fork(blocks, 7)
    pool.release(blocks)
    assert pool.num_free == 2


def test_exercise1_copies_what_attention_reads(solution: Solution) -> None:
    """Both go on by tokens of their own, and each attends to its own text."""
    module = solution("chapter7_exercise1")
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 22, 2, 32), np.float32)  # 20 tokens, and one of each sequence
    cache = LayerCache.empty(8, 16, 2, 32)
    pool = module.ForkingPool(block_size=16, max_blocks=8)
    first = pool.allocate(2)

    def put(blocks: list[int], places: list[int], rows: list[int]) -> None:
        slots = np.array([blocks[p // 16] * 16 + p % 16 for p in places], np.int64)
        write_kv(Tensor.from_numpy(k[rows]), Tensor.from_numpy(v[rows]), cache, Tensor.from_numpy(slots))

    put(first, list(range(20)), list(range(20)))
    second, copies = pool.fork(first, 20)
    module.copy_blocks(cache, copies)
    put(first, [20], [20])
    put(second, [20], [21])
    q = rng.standard_normal((1, 4, 32), np.float32)
    for blocks, own in ((first, 20), (second, 21)):
        rows = [*range(20), own]
        expected = reference(q, k[rows], v[rows], [1], [21], 1.0)
        _, batch = paged_cache(
            Tensor.from_numpy(k[rows]), Tensor.from_numpy(v[rows]), [1], [21], 16, DType.float32
        )
        batch.block_table.copy_(Tensor.from_numpy(np.array([blocks], np.int32)))
        found = attention(Tensor.from_numpy(q), cache, batch, 1.0).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_exercise2(solution: Solution) -> None:
    module = solution("chapter7_exercise2")
    # One place: in the order of arrival they end after 5, 6 and 8 steps, the shortest first after 1, 3 and 8.
    requests = [(0, 5), (0, 1), (0, 2)]
    assert module.mean_time(requests, 1, module.first_come) == (5 + 6 + 8) / 3
    assert module.mean_time(requests, 1, module.shortest) == (8 + 1 + 3) / 3
    # Two places: the third begins when the second has ended.
    assert module.mean_time(requests, 2, module.first_come) == (5 + 1 + 3) / 3
    # Who comes while the device is idle begins at once.
    assert module.mean_time([(0, 2), (10, 3)], 4, module.shortest) == 2.5
    rng = np.random.default_rng(0)
    many = list(zip(rng.integers(0, 200, 100).tolist(), rng.integers(1, 60, 100).tolist(), strict=True))
    assert module.mean_time(many, 8, module.shortest) < module.mean_time(many, 8, module.first_come)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 12, 13])
def test_exercise3(solution: Solution, window: int) -> None:
    module = solution("chapter7_exercise3")
    size, most = 4, 0
    pool = BlockPool(size, max_blocks=(window + size - 2) // size + 1)
    blocks: list[int] = []
    for place in range(60):  # the next token to be computed
        module.release_behind(pool, blocks, place, window)
        if place % size == 0:
            blocks += pool.allocate(1)
        looked_at = range(max(0, place - window + 1), place + 1)
        needed = {p // size for p in looked_at}
        held = {index for index, block in enumerate(blocks) if block != module.GONE}
        assert held == needed
        most = max(most, len(held))
    assert most == pool.max_blocks
