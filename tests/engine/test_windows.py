"""How texts are cut: against a plain restatement of llama.cpp's loops, and by hand."""

from __future__ import annotations

import pytest

from kuiperllm import UsageError
from kuiperllm.engine.windows import Window, chunks, sliding, whole


def seen(windows: list[Window]) -> list[tuple[list[int], list[int]]]:
    """(context, scored tokens) of each window."""
    return [(window.ids[: window.first], window.ids[window.first :]) for window in windows]


def test_chunks_of_a_short_text_by_hand() -> None:
    found = seen(chunks([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], 6, bos=1))
    assert found == [([1, 11, 12, 13], [14, 15]), ([1, 17, 18, 19], [20, 21])]
    assert seen(chunks([10, 11, 12, 13, 14, 15, 16, 17], 4, bos=None)) == [
        ([10, 11, 12], [13]),
        ([14, 15, 16], [17]),
    ]


def test_sliding_windows_of_a_short_text_by_hand() -> None:
    found = seen(sliding(list(range(10, 22)), 4, stride=3))  # windows of 4 + 3 // 2
    assert found == [([10, 11], [12, 13, 14]), ([13, 14], [15, 16, 17]), ([16, 17], [18, 19, 20])]


@pytest.mark.parametrize("context", [4, 5, 16, 31])
@pytest.mark.parametrize("length", [62, 63, 64, 100, 101])
def test_chunks_are_those_of_llama_cpp(context: int, length: int) -> None:
    """Logits of places n/2 to n - 2 of each chunk say what is at n/2 + 1 to n - 1; chunks begin with BOS."""
    ids = list(range(1000, 1000 + length))
    expected = []
    for index in range(length // context):
        chunk = ids[index * context : (index + 1) * context]
        chunk[0] = 7
        expected.append((chunk, list(range(context // 2, context - 1))))
    found = chunks(ids, context, bos=7)
    assert [(w.ids, [place - 1 for place in range(w.first, w.length)]) for w in found] == expected
    assert [w.num_scored for w in found] == [context - context // 2 - 1] * len(found)


@pytest.mark.parametrize(("context", "stride"), [(4, 1), (8, 3), (8, 8), (20, 10)])
@pytest.mark.parametrize("length", [60, 61, 62, 67])
def test_sliding_windows_are_those_of_llama_cpp(context: int, stride: int, length: int) -> None:
    ids = list(range(1000, 1000 + length))
    size = context + stride // 2
    starts, start = [], 0
    while start + size < length:
        starts.append(start)
        start += stride
    found = sliding(ids, context, stride)
    assert [w.ids for w in found] == [ids[start : start + size] for start in starts]
    assert all(w.num_scored == stride for w in found)
    scored = [token for w in found for token in w.ids[w.first :]]
    assert scored == ids[size - stride : size - stride + len(scored)]  # each token once, in order


def test_whole_texts() -> None:
    found = whole([[1, 2, 3], [], [4], [5, 6]])
    assert seen(found) == [([1], [2, 3]), ([5], [6])]


def test_the_text_itself_is_not_changed() -> None:
    ids = list(range(20))
    [window.ids for window in chunks(ids, 5, bos=99)]
    assert ids == list(range(20))


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda: chunks(range(99), 50, None), "99 tokens, and windows of 50 need 100 or more"),
        (lambda: chunks(range(99), 50, None), "or a context of at most 49"),
        (lambda: sliding(range(99), 46, 9), "99 tokens, and windows of 50 need 100 or more"),
        (lambda: sliding(range(99), 46, 9), "or a context of at most 45"),
        (lambda: sliding(range(99), 10, 11), "stride 11 is not possible; choose 1 to 10"),
    ],
)
def test_what_is_refused(cut: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cut()  # type: ignore[operator]


def test_the_advice_works_and_hopeless_texts_get_none() -> None:
    assert len(chunks(range(99), 49, None)) == 2
    assert len(sliding(range(99), 45, 9)) >= 1
    with pytest.raises(UsageError, match=r"use a longer text$"):
        chunks(range(7), 50, None)
