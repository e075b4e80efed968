"""What the programs that time attention share: random caches, batches, times of graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import median
from time import perf_counter

import numpy as np

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.attention import Batch, LayerCache

BLOCK_SIZE = 32
LAYERS_BYTES = 400 << 20
"""Keys and values of all layers together: several times a second-level cache."""

MAX_LAYERS = 128
SAMPLES = 7
SECONDS_PER_SAMPLE = 0.02
DTYPE = DType.bfloat16


def seconds_per_replay(work: Callable[[], object], device: Device) -> float:
    """Of a graph of the work: the median of some samples."""
    work()
    with device.capture() as graph:
        work()

    def sample(repeats: int) -> float:
        device.synchronize()
        started = perf_counter()
        for _ in range(repeats):
            graph.replay()
        device.synchronize()
        return (perf_counter() - started) / repeats

    sample(2)
    repeats = max(2, round(SECONDS_PER_SAMPLE / sample(3)))
    return median(sample(repeats) for _ in range(SAMPLES))


@cache
def noise(device: Device) -> Tensor:
    """Some millions of normal numbers."""
    values = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(DTYPE.numpy)
    return Tensor.from_numpy(values).to(device)


def random(shape: tuple[int, ...], device: Device) -> Tensor:
    """Standard normal values; large tensors repeat some."""
    made = Tensor.empty(shape, DTYPE, device)
    flat = made.reshape((made.numel,))
    values = noise(device)
    first = min(made.numel, values.numel)
    flat[:first].copy_(values[:first])
    while first < made.numel:
        more = min(first, made.numel - first)
        flat[first : first + more].copy_(flat[:more])
        first += more
    return made


def caches(tokens: int, kv_heads: int, head_dim: int, count: int, device: Device) -> list[LayerCache]:
    """Caches of some layers with room for `tokens`."""
    blocks = -(-tokens // BLOCK_SIZE)
    size = blocks, kv_heads, BLOCK_SIZE, head_dim
    return [
        LayerCache(random(size, device), random(size, device), blocks, BLOCK_SIZE, kv_heads, head_dim)
        for _ in range(count)
    ]


def batch_of(query_len: int, seq_len: int, device: Device) -> Batch:
    """One sequence, its blocks in a scrambled order."""

    def put(values: object, kind: type[np.generic]) -> Tensor:
        return Tensor.from_numpy(np.asarray(values, kind)).to(device)

    table = np.random.default_rng(1).permutation(-(-seq_len // BLOCK_SIZE))
    positions = np.arange(seq_len - query_len, seq_len)
    return Batch(
        positions=put(positions, np.int32),
        slot_mapping=put(table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE, np.int64),
        block_table=put(table[None], np.int32),
        query_start_loc=put([0, query_len], np.int32),
        seq_lens=put([seq_len], np.int32),
        max_query_len=query_len,
        is_captured_step=query_len == 1,
    )


def layers_for(nbytes: int) -> int:
    """How many layers of so many bytes."""
    return max(2, min(MAX_LAYERS, LAYERS_BYTES // nbytes))
