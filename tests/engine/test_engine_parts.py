"""Small parts of the engine: what a text holds, arrays in one piece, sizes of batches, merged deltas."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuiperllm.config import SamplingParams
from kuiperllm.core import Device, Tensor
from kuiperllm.engine.inputs import Fields, Inputs
from kuiperllm.engine.newest import Newest, TokenRing
from kuiperllm.engine.outbox import Outbox
from kuiperllm.engine.passes import padded_size
from kuiperllm.engine.penalties import SeenTokens
from kuiperllm.engine.rows import Rows
from kuiperllm.engine.scheduler import Step
from kuiperllm.engine.sequence import Sequence


@given(
    prompt=st.lists(st.integers(0, 300), max_size=100),
    pieces=st.lists(st.lists(st.integers(0, 300), max_size=60), max_size=6),
)
def test_what_a_text_holds(prompt: list[int], pieces: list[list[int]]) -> None:
    seen, output = SeenTokens(prompt), list[int]()
    for piece in pieces:
        output += piece
        seen.update(output)
        counts = Counter(output)
        expected = {token: counts[token] for token in (*prompt, *output)}
        assert dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True)) == expected
        assert len(seen.ids) == len(expected)


def test_arrays_in_one_piece(any_device: Device) -> None:
    fields: Fields = {
        "a": (np.int32, (3,)),
        "none": (np.int32, (0, 5)),
        "b": (np.int64, (2, 2)),
        "c": (np.float32, (5,)),
    }
    inputs = Inputs(any_device, fields)
    for number, (name, (dtype, shape)) in enumerate(fields.items()):
        assert inputs.tensors[name].shape == shape
        assert inputs.host[name].dtype == dtype
        inputs.host[name][:] = number + 1
    inputs.upload()
    assert [inputs.tensors[name].numpy().tolist() for name in "abc"] == [[1] * 3, [[3, 3], [3, 3]], [4.0] * 5]
    for name in "abc":
        inputs.host[name][:] = 7
    inputs.upload("b")
    found = [inputs.tensors[name].numpy().tolist() for name in "abc"]
    assert found[1:] == [[[7, 7], [7, 7]], [7.0] * 5]
    assert found[0] == ([7] * 3 if any_device.is_host else [1] * 3)


def test_sizes_of_padded_batches() -> None:
    sizes = {padded_size(count) for count in range(1, 513)}
    assert sorted(sizes) == [*range(1, 9), 16, 24, 32, 48, 64, *range(96, 257, 32), *range(320, 513, 64)]
    assert all(count <= padded_size(count) < count + max(8, count // 2) for count in range(1, 1000))


def test_tokens_that_only_the_device_knows() -> None:
    def sequence(prompt: int, output: int, pending: int) -> Sequence:
        made = Sequence(list(range(prompt)), SamplingParams(), seed=0, max_tokens=99)
        made.output_ids = list(range(100, 100 + output))
        made.num_tokens, made.num_pending = prompt + output + pending, pending
        return made

    last = [sequence(3, 2, 2), sequence(4, 0, 2)]
    known, piece = sequence(5, 1, 1), sequence(9, 0, 0)
    step = Step([last[1], known, last[0], piece], [1, 1, 1, 4], [4, 5, 5, 2], 3, 3)
    given, source = np.full(9, -7, np.int32), np.zeros(9, np.int32)
    Newest(last, None).fill(step, given, source)
    assert source.tolist() == [1, -1, 0, -1, -1, -1, -1, -1, -1]
    assert given.tolist() == [-7, 100, -7, 2, 3, 4, 5, -7, -7]


def test_rows_are_taken_in_turn(any_device: Device) -> None:
    ring = TokenRing(any_device, 6)
    rows = [ring.take() for _ in range(8)]
    for number, (_, tensor) in enumerate(rows[:4]):
        tensor.copy_(Tensor.from_numpy(np.full(6, number, np.int32)).to(any_device))
    any_device.backend.record().wait()
    assert [host.tolist() for host, _ in rows] == 2 * [[number] * 6 for number in range(4)]
    assert ring.of_graph()[1].address == ring.history.address


def test_what_is_posted_is_read_once_and_its_memory_used_again(any_device: Device) -> None:
    outbox = Outbox(any_device)
    rng = np.random.default_rng(0)
    for _ in range(3):
        arrays = [rng.standard_normal((4, 5), np.float32), rng.standard_normal((700, 3), np.float32)]
        arrays.append(rng.integers(0, 9, (2, 0), np.int32))
        reads = [outbox.post(Tensor.from_numpy(array).to(any_device)) for array in arrays]
        any_device.backend.record().wait()
        for read, array in zip(reads, arrays, strict=True):
            np.testing.assert_array_equal(read(), array)
    assert all(len(unused) == 1 for unused in outbox._unused.values())


def test_a_row_says_nothing_of_who_had_it_before() -> None:
    rows = Rows(2, 8, 16)
    first, second = (Sequence([1], SamplingParams(), seed=2**64 - 1, max_tokens=1, row=1) for _ in range(2))
    first.blocks, second.blocks = [5, 6, 7], [3]
    rows.update([first])
    rows.update([second])
    assert rows.table.tolist() == [[0] * 8, [3] + [0] * 7]
    assert rows.slots(np.array([1, 1]), np.array([0, 15])).tolist() == [48, 63]
    assert rows.parameters["seeds"].tolist() == [0, -1]


@pytest.mark.parametrize("count", [1, 7, 129])
def test_places_of_tokens_in_the_cache(count: int) -> None:
    rng = np.random.default_rng(count)
    rows = Rows(3, 40, 16)
    rows.table[:] = rng.permutation(120).reshape(3, 40)
    of, places = rng.integers(0, 3, count), rng.integers(0, 640, count)
    expected = [int(rows.table[r, p // 16]) * 16 + int(p) % 16 for r, p in zip(of, places, strict=True)]
    assert rows.slots(of, places).tolist() == expected
