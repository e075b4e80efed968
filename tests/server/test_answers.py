"""What a model writes is taken apart in the same way, however it comes in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.server.answers import (
    TOOL_FORMATS,
    AnswerParser,
    Arguments,
    Call,
    Content,
    Piece,
    Reasoning,
    Thinking,
    ThinkingState,
    detect_tool_format,
)
from kuiperllm.server.answers.counting import reasoning_tokens
from kuiperllm.server.answers.reasoning import state_after
from kuiperllm.text import load_tokenizer

NAMES = frozenset({"weather", "time"})


def taken_apart(
    parts: list[str], thinking: ThinkingState | None = None, tools: str | None = None
) -> dict[str, Any]:
    parser = AnswerParser(
        None if thinking is None else Thinking(thinking),
        None if tools is None else TOOL_FORMATS[tools].parser(NAMES),
    )
    pieces: list[Piece] = []
    for part in parts:
        pieces += parser.push(part)
    return summed(pieces + parser.finish())


def summed(pieces: list[Piece]) -> dict[str, Any]:
    found: dict[str, Any] = {"reasoning": "", "content": "", "calls": []}
    for piece in pieces:
        match piece:
            case Reasoning(text):
                found["reasoning"] += text
            case Content(text):
                found["content"] += text
            case Call(index, name):
                assert index == len(found["calls"])
                found["calls"].append([name, ""])
            case Arguments(index, text):
                assert index == len(found["calls"]) - 1
                found["calls"][index][1] += text
    return found


def result(content: str = "", calls: list[list[str]] | None = None, reasoning: str = "") -> dict[str, Any]:
    return {"reasoning": reasoning, "content": content, "calls": calls or []}


ONE = (
    '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome}", "n": [1, {"a": "\\"]"}]}}\n</tool_call>'
)
ARGUMENTS = '{"town": "Rome}", "n": [1, {"a": "\\"]"}]}'
TIME = '<tool_call>{"arguments": {}, "name": "time"}</tool_call>'

HERMES = [
    ("Hello there", result("Hello there")),
    ("", result()),
    ("a < b <tool", result("a < b <tool")),
    (ONE, result("", [["weather", ARGUMENTS]])),
    (f"Let me see.\n\n{ONE}", result("Let me see.", [["weather", ARGUMENTS]])),
    (f"{ONE}\n{TIME}", result("", [["weather", ARGUMENTS], ["time", "{}"]])),
    (f"{ONE} and so on", result("and so on", [["weather", ARGUMENTS]])),
    ('<tool_call>{"name": "time"}</tool_call>', result("", [["time", "{}"]])),
    (
        '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>',
        result("", [["time", '{"a": 1}']]),
    ),
    ('<tool_call>{"name": "time", "arguments": {"a": 1', result("", [["time", '{"a": 1']])),  # cut off
    ('<tool_call>{"name": "ti', result('<tool_call>{"name": "ti')),
    ("<tool_call>nonsense</tool_call> x", result("<tool_call>nonsense</tool_call> x")),
    ('<tool_call>{"x": 1}</tool_call>', result('<tool_call>{"x": 1}</tool_call>')),
    ('<tool_call>{"name": 5}</tool_call>', result('<tool_call>{"name": 5}</tool_call>')),
    ('<tool_call>[{"name": "time"}]</tool_call>', result('<tool_call>[{"name": "time"}]</tool_call>')),
    ('<tool_call>{"name": "time", "arguments": null}</tool_call>', result("", [["time", "null"]])),
    ('<tool_call>{"name": "time", "arguments": 12 }</tool_call>', result("", [["time", "12"]])),
    ('<tool_call>{"type": "function", "id": 7, "name": "time"}</tool_call>', result("", [["time", "{}"]])),
    ("text with trailing blanks  \n", result("text with trailing blanks  \n")),
]
LLAMA3 = [
    ("Hello {there}", result("Hello {there}")),
    ('{"name": "weather", "parameters": {"a": 1}}', result("", [["weather", '{"a": 1}']])),
    ('\n<|python_tag|>{"name": "time", "parameters": {}}', result("", [["time", "{}"]])),
    (
        '{"type": "function", "name": "time", "parameters": {}}; '
        '{"name": "weather", "parameters": {"x": "y"}}',
        result("", [["time", "{}"], ["weather", '{"x": "y"}']]),
    ),
    (
        '{"name": "other", "parameters": {}}',
        result('{"name": "other", "parameters": {}}'),
    ),  # the answer is JSON
    ('{"city": "Rome"}', result('{"city": "Rome"}')),
    ('{"name": "wea', result('{"name": "wea')),
    ("{", result("{")),
    ('{"name": "time", "parameters": {"a', result("", [["time", '{"a']])),
    ('{"name": "time"} ', result("", [["time", "{}"]])),
    ("<|python", result("<|python")),
]
THINKING: list[tuple[str, ThinkingState, dict[str, Any]]] = [
    ("<think>\nhm <b>\n</think>\n\nAnswer", "possible", result("Answer", reasoning="hm <b>")),
    ("hm\n</think>\n\nAnswer\n", "open", result("Answer\n", reasoning="hm")),
    ("Answer <think>", "closed", result("Answer <think>")),
    ("  Answer", "possible", result("  Answer")),
    ("<thin", "possible", result("<thin")),
    ("<think>cut off </thi", "possible", result(reasoning="cut off </thi")),
    ("<think>", "possible", result()),
    ("<think>\n\n</think>\n\nAnswer", "possible", result("Answer")),
    ("\n\nAnswer", "closed", result("Answer")),
    ("a </think", "open", result(reasoning="a </think")),
    ("", "open", result()),
    ("<think>a</think>b</think>c", "possible", result("b</think>c", reasoning="a")),
]


@pytest.mark.parametrize(("text", "wanted"), HERMES)
def test_hermes(text: str, wanted: dict[str, Any]) -> None:
    check_all_ways(text, wanted, tools="hermes")


@pytest.mark.parametrize(("text", "wanted"), LLAMA3)
def test_llama3(text: str, wanted: dict[str, Any]) -> None:
    check_all_ways(text, wanted, tools="llama3")


@pytest.mark.parametrize(("text", "state", "wanted"), THINKING)
def test_reasoning(text: str, state: ThinkingState, wanted: dict[str, Any]) -> None:
    check_all_ways(text, wanted, thinking=state)


def check_all_ways(text: str, wanted: dict[str, Any], **how: Any) -> None:
    """Whole, by character, and cut in two at every place."""
    assert taken_apart([text], **how) == wanted
    assert taken_apart(list(text), **how) == wanted
    for place in range(1, len(text)):
        assert taken_apart([text[:place], text[place:]], **how) == wanted, place


def test_reasoning_then_a_call() -> None:
    text = f"<think>\nI must look.\n</think>\n\n{ONE}"
    wanted = result("", [["weather", ARGUMENTS]], "I must look.")
    check_all_ways(text, wanted, thinking="possible", tools="hermes")


def test_calls_inside_reasoning_are_reasoning() -> None:
    found = taken_apart([f"<think>{TIME}</think>ok"], thinking="possible", tools="hermes")
    assert found == result("ok", reasoning=TIME)


fragments = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            '{"name": "time"',
            ', "arguments": {',
            "}",
            '"',
            "\\",
            *("{", "[", "]", ":", ",", "\n", " ", "text", "<", "parameters", ";", "<|python_tag|>", "é", "1"),
        ]
    ),
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(fragments, st.data())
def test_any_text_in_any_pieces(parts: list[str], data: st.DataObject) -> None:
    how: dict[str, Any] = {
        "thinking": data.draw(st.sampled_from([None, "open", "possible", "closed"])),
        "tools": data.draw(st.sampled_from([None, "hermes", "llama3"])),
    }
    text = "".join(parts)
    whole = taken_apart([text], **how)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert taken_apart(pieces, **how) == whole
    if how["thinking"] is None and how["tools"] is None:
        assert whole == result(text)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    ).filter(lambda value: isinstance(value, dict)),
    st.sampled_from(["hermes", "llama3"]),
    st.booleans(),
)
def test_arguments_come_out_as_they_went_in(arguments: Any, name: str, ascii_only: bool) -> None:
    key = TOOL_FORMATS[name].arguments_key
    call = json.dumps({"name": "time", key: arguments}, ensure_ascii=ascii_only)
    text = f"<tool_call>\n{call}\n</tool_call>" if name == "hermes" else call
    found = taken_apart(list(text), tools=name)
    assert found["content"] == ""
    ((called, given_back),) = found["calls"]
    assert called == "time"
    assert json.loads(given_back) == arguments


def test_arguments_come_as_they_are_written() -> None:
    """Long arguments are not held back, and take time in proportion to their length."""
    parser = TOOL_FORMATS["hermes"].parser(NAMES)
    parser.push('<tool_call>\n{"name": "time", "arguments": {"text": "')
    for _ in range(20_000):
        assert parser.push("some words ") == [Arguments(0, "some words ")]


@pytest.mark.parametrize(
    ("prompt", "state"),
    [("<|im_start|>assistant\n", "possible"), ("x<think>\n", "open"), ("<think>\n\n</think>\n\n", "closed")],
)
def test_where_a_prompt_ends(prompt: str, state: ThinkingState) -> None:
    assert state_after(prompt) == state


def test_counting_reasoning(tiny_model: Any) -> None:
    tokenizer = load_tokenizer(tiny_model)

    def count(text: str, state: ThinkingState | None) -> int:
        return reasoning_tokens(tokenizer, list(text.encode()), state)

    assert count("<think>ab</think>cd", "possible") == len("<think>ab</think>")
    assert count("ab</think>cd", "open") == len("ab</think>")
    assert count("abc", "open") == 3
    assert count("abc</think>", "possible") == 0
    assert count("abc</think>", "closed") == 0
    assert count("abc</think>", None) == 0


@pytest.mark.shared
def test_formats_are_found_in_real_templates(shared: Any) -> None:
    found = {}
    for path in sorted((shared / "chat_templates").glob("*.jinja")):
        made = detect_tool_format(path.read_text())
        found[path.stem] = next((name for name, one in TOOL_FORMATS.items() if one is made), None)
    assert found["Qwen-Qwen3-0.6B"] == found["Qwen-Qwen2.5-7B-Instruct"] == "hermes"
    assert found["NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use"] == "hermes"
    for name in ("meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct"):
        assert found[name] == "llama3"
    assert found["mistralai-Mistral-Nemo-Instruct-2407"] is None
