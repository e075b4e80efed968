"""Streaming text: equal to decoding everything at once, in whole characters."""

# ruff: noqa: RUF001
from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.errors import TokenizerError
from kuiperllm.text import Detokenizer, StopStrings, Tokenizer

IDS = st.lists(st.integers(0, 2**31), max_size=40)


@settings(max_examples=60, deadline=None)
@given(IDS, st.booleans())
def test_streaming_equals_decoding(
    small_tokenizers: dict[str, Tokenizer], numbers: list[int], skip: bool
) -> None:
    """Random ids hit byte tokens, halves of characters and special tokens in any order."""
    for tokenizer in small_tokenizers.values():
        ids = [number % tokenizer.vocab_size for number in numbers]
        stream = Detokenizer(tokenizer, skip_special_tokens=skip)
        text = "".join([*map(stream.push, ids), stream.finish()])
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)


def test_characters_come_whole(any_tokenizer: Tokenizer) -> None:
    text = "ʘ🙂é世"
    stream = Detokenizer(any_tokenizer)
    ids = any_tokenizer.encode(text)
    assert len(ids) > len(text)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == text
    assert "" in pieces
    assert stream.finish() == ""


def test_an_unfinished_character_is_replaced_at_the_end(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode("𝔘")  # four bytes, not in the training text
    stream = Detokenizer(any_tokenizer)
    assert "".join(stream.push(token_id) for token_id in ids[:-1]) == ""
    assert stream.finish() == "\ufffd"


def test_after_a_prompt_the_text_goes_on_in_mid_sentence(spm: Tokenizer) -> None:
    word = spm.encode("upon", add_special_tokens=False)
    for prompt, expected in (([], "upon"), ([1], "upon"), (spm.encode("Once"), " upon")):
        stream = Detokenizer(spm, prompt_ids=prompt)
        assert "".join(map(stream.push, word)) == expected


def test_ids_out_of_range_are_refused(any_tokenizer: Tokenizer) -> None:
    stream = Detokenizer(any_tokenizer)
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        stream.push(any_tokenizer.vocab_size)
    assert stream.push(any_tokenizer.encode("a")[-1]).strip() == "a"


def test_each_push_takes_the_same_time(any_tokenizer: Tokenizer) -> None:
    stream = Detokenizer(any_tokenizer)
    start = time.monotonic()
    for _ in range(100_000):
        stream.push(100)
    assert time.monotonic() - start < 5.0


# --- stop strings -----------------------------------------------------------------------------------------


def cut_by_hand(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop string that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        endings = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if endings:
            longest = max(endings, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab\n", max_size=5), max_size=12),
    st.lists(st.text("ab\n", max_size=5), max_size=3),
)
def test_stop_strings_cut_where_they_should(chunks: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        shown += stream.push(chunk)
        so_far = "".join(chunks)
        assert so_far.startswith(shown)
    expected, matched = cut_by_hand("".join(chunks), stops)
    assert stream.matched == matched
    assert shown + stream.finish() == expected
    assert matched is None or shown == expected  # nothing is left over once a stop string was found


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    stream = StopStrings(["</end>"])
    assert stream.push("hello </e") == "hello "
    assert stream.push("x <") == "</ex "
    assert stream.push("/end> more") == ""
    assert stream.matched == "</end>"
    assert stream.push("even more") == ""
    assert stream.finish() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    stream = StopStrings([])
    assert stream.push("text") == "text"
    assert stream.matched is None


def test_long_stop_strings_are_found_in_linear_time() -> None:
    stream = StopStrings(["a" * 50_000 + "b"])
    start = time.monotonic()
    shown = "".join(stream.push("a" * 1000) for _ in range(200))
    assert len(shown) == 150_000
    assert time.monotonic() - start < 5.0
