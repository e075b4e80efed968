"""How a generation ends and what text it gives, with a model whose every token is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kuiperllm import LLM, ChatTemplateError, Completion, SamplingParams
from tiny_models import ASSISTANT, BASE, BOS, EOS, USER, random_weights, write_checkpoint

ALPHABET = "abcdefghijklømnopqrstuvwxyz"


def write(llm: LLM, prompt: Any, **options: Any) -> Completion:
    return llm.generate(prompt, SamplingParams(temperature=0.0, **options))[0]


def test_the_end_of_text_token_ends_the_text_and_is_not_in_it(chain: LLM) -> None:
    done = write(chain, "a")
    assert done.text == ALPHABET[1:]
    assert done.token_ids == [*ALPHABET[1:].encode(), EOS]
    assert (done.finish_reason, done.stop_reason) == ("stop", None)
    assert done.prompt_token_ids == [BOS, ord("a")]
    assert done.logprobs is None


def test_ignore_eos_goes_on_behind_it(chain: LLM) -> None:
    done = write(chain, "x", ignore_eos=True, max_tokens=6)
    assert done.token_ids == [ord("y"), ord("z"), EOS, *b"abc"]
    assert done.text == "yzabc"
    assert done.finish_reason == "length"


def test_skip_special_tokens_off_shows_their_names(chain: LLM) -> None:
    done = write(chain, "x", ignore_eos=True, max_tokens=4, skip_special_tokens=False)
    assert done.text == "yz</s>a"


def test_max_tokens(chain: LLM) -> None:
    done = write(chain, "a", max_tokens=3)
    assert (done.text, done.finish_reason, done.stop_reason) == ("bcd", "length", None)


def test_max_tokens_inside_a_character_shows_that_it_is_incomplete(chain: LLM) -> None:
    assert write(chain, "k", max_tokens=2).text == "l\ufffd"
    assert write(chain, "k", max_tokens=3).text == "lø"


def test_a_full_context_ends_with_length(chain: LLM) -> None:
    done = write(chain, "0123", ignore_eos=True)
    assert len(done.prompt_token_ids) + len(done.token_ids) == 64
    assert done.finish_reason == "length"
    assert done.text == ("0123456789" * 7)[4:63]


def test_a_prompt_that_leaves_room_for_one_token(chain: LLM) -> None:
    done = write(chain, list(b"0" * 63), max_tokens=10)
    assert (done.text, done.finish_reason) == ("1", "length")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (("fgh",), "bcde", "fgh"),
        ("fgh", "bcde", "fgh"),
        (("ø",), "bcdefghijkl", "ø"),
        (("zzz", "jk", "hij"), "bcdefg", "hij"),
        (("b",), "", "b"),
        (("yz",), "bcdefghijklømnopqrstuvwx", "yz"),
        (("zz",), ALPHABET[1:], None),
    ],
)
def test_stop_strings(chain: LLM, stop: Any, text: str, reason: str | None) -> None:
    done = write(chain, "a", stop=stop)
    assert (done.text, done.finish_reason, done.stop_reason) == (text, "stop", reason)


def test_a_half_stop_string_is_given_out_at_the_end(chain: LLM) -> None:
    done = write(chain, "a", stop=("de!",), max_tokens=4)
    assert (done.text, done.finish_reason) == ("bcde", "length")


def test_text_that_might_become_a_stop_string_is_held_back(chain: LLM) -> None:
    chunks = list(chain.stream("a", SamplingParams(temperature=0.0, stop=("efx",), max_tokens=6)))
    assert [chunk.text for chunk in chunks] == ["b", "c", "d", "", "", "efg"]
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text  # type: ignore[union-attr]


def test_stop_token_ids(chain: LLM) -> None:
    done = write(chain, "a", stop_token_ids=(ord("q"), ord("e")))
    assert (done.text, done.finish_reason, done.stop_reason) == ("bcd", "stop", ord("e"))
    assert done.token_ids == list(b"bcde")


def test_min_tokens_holds_end_tokens_back(chain: LLM) -> None:
    assert write(chain, "x", min_tokens=2).token_ids == [*b"yz", EOS]
    done = write(chain, "x", min_tokens=3, max_tokens=3)
    assert done.token_ids[:2] == list(b"yz")
    assert done.token_ids[2] != EOS
    done = write(chain, "a", min_tokens=3, stop_token_ids=(ord("b"), ord("c")), max_tokens=5)
    assert not {ord("b"), ord("c"), EOS} & set(done.token_ids[:3])


def test_special_tokens_in_a_prompt_are_text(chain: LLM) -> None:
    assert write(chain, "</s>", max_tokens=1).prompt_token_ids == [BOS, *b"</s>"]


def test_chat(chain: LLM) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chain.apply_chat_template(messages) == [BOS, USER, ord("a"), ASSISTANT, ord("b"), ASSISTANT]
    params = SamplingParams(temperature=0.0, max_tokens=3)
    done = chain.chat(messages, params)
    assert done.prompt_token_ids == chain.apply_chat_template(messages)
    *_, last = chain.stream_chat(messages, params)
    assert last.completion is not None
    assert last.completion.token_ids == done.token_ids
    no_prompt = chain.apply_chat_template(messages, add_generation_prompt=False)
    assert no_prompt == chain.apply_chat_template(messages)[:-1]


def test_chat_without_a_template(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, BASE, random_weights(BASE), template=False)
    with pytest.raises(ChatTemplateError, match=r"has no chat template.*use generate"):
        LLM(tmp_path).chat([{"role": "user", "content": "a"}])
