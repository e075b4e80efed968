"""OpenAI's own client drives every endpoint; values are compared with `LLM` on the same model."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
from live import Live
from pydantic import BaseModel

from kuiperllm import LLM, SamplingParams

MESSAGES: Any = [{"role": "user", "content": "hi"}]
GREEDY: Any = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model)


# --- chat -------------------------------------------------------------------------------------------------


def test_chat_is_what_the_model_says(client: openai.OpenAI, llm: LLM) -> None:
    wanted = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12))
    answer = client.chat.completions.create(messages=MESSAGES, max_tokens=12, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == wanted.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == wanted.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(wanted.prompt_token_ids) + 12


def test_chat_streams_the_same(client: openai.OpenAI, llm: LLM) -> None:
    wanted = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12))
    stream = client.chat.completions.create(
        messages=MESSAGES,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == wanted.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_usage_so_far_in_every_chunk(live: Live) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    events = live.events(
        "/v1/chat/completions", messages=MESSAGES, max_tokens=6, temperature=0, stream_options=options
    )
    made = [event["usage"]["completion_tokens"] for event in events]
    assert made == sorted(made)
    assert made[-1] == 6


def test_chat_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    wanted = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=5, logprobs=3))
    answer = client.chat.completions.create(
        messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY
    )
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None
    assert wanted.logprobs is not None
    assert [entry.bytes for entry in entries] == [[token] for token in wanted.token_ids]
    for entry, truth in zip(entries, wanted.logprobs, strict=True):
        assert entry.logprob == pytest.approx(truth.logprob, abs=1e-5)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            [p for _, p in truth.top], abs=1e-5
        )


def test_streamed_log_probabilities_are_the_same(live: Live) -> None:
    body = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = live.post("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
    events = live.events("/v1/chat/completions", **body)
    parts = [entry for e in events for entry in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert parts == whole


def test_several_outputs(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    answer = create(model="tiny", messages=MESSAGES, n=3, seed=5, max_tokens=8)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    again: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in create(model="tiny", messages=MESSAGES, n=3, seed=5, max_tokens=8, stream=True):
        for choice in chunk.choices:
            again[choice.index] += choice.delta.content or ""
    assert list(again.values()) == texts


@pytest.mark.parametrize("seed", [1, -1, 2**63 - 1])
def test_a_seed_repeats_the_text(client: openai.OpenAI, seed: int) -> None:
    def text() -> str | None:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=seed, max_tokens=12)
        return answer.choices[0].message.content

    assert text() == text()


def test_bias_decides_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logit_bias={str(ord("q")): 100}, max_tokens=6
    )
    assert answer.choices[0].message.content == "qqqqqq"


def test_penalties_forbid_repetition(client: openai.OpenAI) -> None:
    biases = {str(ord(letter)): 100 - index for index, letter in enumerate("abcd")}
    answer = client.chat.completions.create(
        messages=MESSAGES, logit_bias=biases, max_tokens=4, presence_penalty=2, frequency_penalty=2, **GREEDY
    )
    text = answer.choices[0].message.content
    assert text is not None
    assert sorted(text) == list("abcd")


def test_stop_strings(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=MESSAGES, logit_bias={str(ord("q")): 100}, stop=["x", "qqq"], max_tokens=9, **GREEDY
    )
    (choice,) = answer.choices
    assert choice.message.content == ""
    assert choice.finish_reason == "stop"
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] == "qqq"


def test_messages_of_every_kind(client: openai.OpenAI, llm: LLM) -> None:
    """What the template gets, seen by the tokens it makes."""
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None},
        {"role": "user", "content": "c", "name": "ann"},
    ]
    plain = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "c"},
    ]
    answer = client.chat.completions.create(messages=messages, max_tokens=1, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(llm.apply_chat_template(plain))


# --- structured output ------------------------------------------------------------------------------------


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    age: int
    tame: bool


def test_parse_gives_an_object(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Pet, max_tokens=300, seed=seed, temperature=2
        )
        assert isinstance(answer.choices[0].message.parsed, Pet)
        assert answer.choices[0].finish_reason == "stop"


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        logit_bias={str(ord("}")): 100},
        max_tokens=100,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"[a-c]{2}/\d{3}"}, r"[a-c]{2}/\d{3}"),
        ({"choice": ["yes", "no", 'quo"te']}, 'yes|no|quo"te'),
        ({"grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
        (
            {"json": {"type": "array", "items": {"const": 7}, "minItems": 2, "maxItems": 2}},
            r"\[\s*7\s*,\s*7\s*\]",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_other_forms(live: Live, form: dict[str, Any], pattern: str, path: str) -> None:
    import re

    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "hi"}
    for seed in range(3):
        answer = live.post(path, structured_outputs=form, max_tokens=300, seed=seed, **prompt).json()
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert re.fullmatch(pattern, text), text
        assert choice["finish_reason"] == "stop"


# --- completions ------------------------------------------------------------------------------------------


def test_completion_is_what_the_model_says(client: openai.OpenAI, llm: LLM) -> None:
    (wanted,) = llm.generate("ab", SamplingParams(temperature=0, max_tokens=16))
    answer = client.completions.create(prompt="ab", **GREEDY)
    assert answer.choices[0].text == wanted.text
    assert answer.object == "text_completion"
    parts = list(client.completions.create(prompt="ab", stream=True, **GREEDY))
    assert "".join(part.choices[0].text for part in parts) == wanted.text
    assert parts[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", [["a", "bc"], [[97], [98, 99]], [97, 98], "a"])
def test_one_prompt_or_many(client: openai.OpenAI, llm: LLM, prompt: Any) -> None:
    wanted = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=5))
    answer = client.completions.create(prompt=prompt, max_tokens=5, **GREEDY)
    assert [choice.text for choice in answer.choices] == [completion.text for completion in wanted]
    texts = [""] * len(wanted)
    for part in client.completions.create(prompt=prompt, max_tokens=5, stream=True, **GREEDY):
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [completion.text for completion in wanted]


def test_outputs_of_many_prompts_are_numbered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == 12


def test_best_of_gives_the_most_likely(client: openai.OpenAI) -> None:
    def mean(choice: Any) -> float:
        return float(np.mean(choice.logprobs.token_logprobs))

    common: Any = {"model": "tiny", "prompt": "ab", "max_tokens": 4, "seed": 3, "logprobs": 0}
    every = client.completions.create(n=6, **common)
    best = client.completions.create(n=2, best_of=6, **common)
    wanted = sorted(map(mean, every.choices), reverse=True)[:2]
    assert [mean(choice) for choice in best.choices] == pytest.approx(wanted, abs=1e-4)


def prompt_logprobs(llm: LLM, ids: list[int]) -> list[float]:
    """Of all tokens but the first, from the logits of those that the tokenizer knows."""
    with llm.scorer() as scorer:
        (logits,) = [part.numpy().astype(np.float64) for _, part in scorer.logits(ids)]
    known = logits[:, : llm.tokenizer.vocab_size]
    chosen = known[np.arange(len(ids) - 1), ids[1:]]
    return list(chosen - np.log(np.exp(known).sum(axis=1)))


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_log_probabilities(client: openai.OpenAI, llm: LLM, max_tokens: int, stream: bool) -> None:
    """As evaluation harnesses ask for it."""
    text = "the cat"
    ids = llm.token_ids(text)
    made = llm.generate(text, SamplingParams(temperature=0, max_tokens=max(1, max_tokens), logprobs=1))[0]
    common: Any = {"prompt": text, "max_tokens": max_tokens, "logprobs": 1, "echo": True, **GREEDY}
    if stream:
        parts = [part.choices[0] for part in client.completions.create(stream=True, **common)]
        answer = "".join(part.text for part in parts)
        lists = [part.logprobs for part in parts if part.logprobs is not None]
        tokens = [token for entry in lists for token in entry.tokens or ()]
        values = [value for entry in lists for value in entry.token_logprobs or ()]
        tops = [top for entry in lists for top in entry.top_logprobs or ()]
        offsets = [offset for entry in lists for offset in entry.text_offset or ()]
    else:
        (choice,) = client.completions.create(**common).choices
        assert choice.logprobs is not None
        answer, tokens = choice.text, choice.logprobs.tokens or []
        values, tops = choice.logprobs.token_logprobs or [], choice.logprobs.top_logprobs or []
        offsets = choice.logprobs.text_offset or []
    assert answer == text + (made.text if max_tokens else "")
    assert len(tokens) == len(values) == len(tops) == len(offsets) == len(ids) + max_tokens
    assert values[0] is None
    assert tops[0] is None
    assert values[1 : len(ids)] == pytest.approx(prompt_logprobs(llm, ids), abs=1e-4)
    assert tokens[1 : len(ids)] == list(text)
    assert offsets[1 : len(ids)] == [offsets[1] + index for index in range(len(text))]
    assert made.logprobs is not None
    assert values[len(ids) :] == pytest.approx([e.logprob for e in made.logprobs[:max_tokens]], abs=1e-4)
    assert all(max(top.values()) >= value - 1e-6 for top, value in zip(tops[1:], values[1:], strict=True))


def test_no_tokens_at_all(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="ab", max_tokens=0, **GREEDY)
    assert answer.choices[0].text == ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


# --- other endpoints --------------------------------------------------------------------------------------


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["the cat", "the dog", "the cat"]
    found = client.embeddings.create(model="tiny", input=texts)  # base64 is what the client asks for
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    vectors = np.array([item.embedding for item in found.data])
    assert np.allclose(vectors, [item.embedding for item in plain.data], atol=1e-7)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors.shape == (3, 64)
    assert np.allclose(vectors[0], vectors[2], atol=1e-6)
    assert vectors[0] @ vectors[1] < 0.999
    assert found.usage.prompt_tokens == 24


def test_embedding_is_the_hidden_state(client: openai.OpenAI, llm: LLM, live: Live) -> None:
    """The direction that the output projection sees: its logits give the model's own greedy choice."""
    raw = live.post("/v1/embeddings", input=[[256, 97, 98]], encoding_format="base64").json()
    vector = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    from safetensors.numpy import load_file

    head = load_file(Path(llm.loaded.name) / "model.safetensors")["lm_head.weight"]
    (made,) = llm.generate([[256, 97, 98]], SamplingParams(temperature=0, max_tokens=1))
    assert int(np.argmax((head @ vector)[:260])) == made.token_ids[0]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other-name"]
    card = client.models.retrieve("other-name")
    assert card.model_extra is not None
    assert card.model_extra["max_model_len"] == 1024
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_tokens_there_and_back(live: Live, llm: LLM) -> None:
    text = "Grüße <|user|>"
    answer = live.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert answer["tokens"] == llm.token_ids(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 1024
    bare = live.post("/tokenize", prompt=text, add_special_tokens=False).json()["tokens"]
    assert bare == answer["tokens"][1:]
    assert live.post("/detokenize", tokens=bare).json() == {"prompt": text}
    chat = live.post("/tokenize", messages=MESSAGES).json()["tokens"]
    assert chat == llm.apply_chat_template(MESSAGES)


# --- tools ------------------------------------------------------------------------------------------------

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer"}, "scale": {"enum": ["C", "F"]}},
            "required": ["days", "scale"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def tools(tiny_model: Path) -> Any:
    """Servers whose model writes calls in each of the formats."""
    from kuiperllm.engine.async_llm import AsyncLLM
    from kuiperllm.server.config import ServerConfig

    found = {
        name: Live(AsyncLLM(tiny_model, max_num_seqs=4), ServerConfig(port=0, tool_format=name))
        for name in ("hermes", "llama3")
    }
    yield found
    for server in found.values():
        server.assert_idle()
        server.stop()


def of(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


@pytest.mark.parametrize("name", ["hermes", "llama3"])
def test_required_call(tools: dict[str, Live], name: str) -> None:
    with of(tools[name]) as client:
        for seed in range(3):
            answer = client.chat.completions.create(
                model=tools[name].llm.loaded.name,
                messages=MESSAGES,
                tools=[WEATHER, TIME],
                tool_choice="required",
                parallel_tool_calls=False,
                max_tokens=300,
                seed=seed,
            )
            (choice,) = answer.choices
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            (call,) = choice.message.tool_calls or []
            assert call.type == "function"
            arguments = json.loads(call.function.arguments)
            if call.function.name == "weather":
                assert set(arguments) == {"days", "scale"}
                assert isinstance(arguments["days"], int)
            else:
                assert (call.function.name, arguments) == ("time", {})


@pytest.mark.parametrize("name", ["hermes", "llama3"])
def test_named_call_streams_its_arguments(tools: dict[str, Live], name: str) -> None:
    with of(tools[name]) as client:
        stream = client.chat.completions.create(
            model=tools[name].llm.loaded.name,
            messages=MESSAGES,
            tools=[WEATHER, TIME],
            tool_choice={"type": "function", "function": {"name": "weather"}},
            max_tokens=300,
            seed=1,
            stream=True,
        )
        parts = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert [part.id is not None for part in parts] == [True] + [False] * (len(parts) - 1)
    assert parts[0].function is not None
    assert parts[0].function.name == "weather"
    pieces = [part.function.arguments or "" for part in parts if part.function]
    assert len(pieces) >= 1  # a reader who is slow gets few, long ones
    assert set(json.loads("".join(pieces))) == {"days", "scale"}


def test_text_beside_tools_is_text(tools: dict[str, Live]) -> None:
    for server in tools.values():
        body = {"messages": MESSAGES, "tools": [WEATHER], "max_tokens": 5, "logit_bias": {str(ord("q")): 100}}
        choice = server.post("/v1/chat/completions", **body).json()["choices"][0]
        assert choice["message"]["content"] == "qqqqq"
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "length"


def test_strict_functions_or_text(tools: dict[str, Live]) -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    for server in tools.values():
        for seed in range(3):
            body = {"messages": MESSAGES, "tools": [strict], "max_tokens": 40, "seed": seed}
            message = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
            for call in message.get("tool_calls") or ():
                assert call["function"]["name"] == "weather"
    forced = {"messages": MESSAGES, "tools": [strict], "max_tokens": 300, "logit_bias": {str(ord("{")): 100}}
    choice = tools["llama3"].post("/v1/chat/completions", **forced).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_call_or_form(tools: dict[str, Live]) -> None:
    """With a form and tools, the answer is a call or has the form."""
    form = {
        "choice": ['<tool_call>\n{"name": "weather", "arguments": {"days": 1, "scale": "C"}}\n</tool_call>']
    }
    body = {
        "messages": MESSAGES,
        "tools": [WEATHER],
        "max_tokens": 200,
        "structured_outputs": form,
        "seed": 1,
    }
    choice = tools["hermes"].post("/v1/chat/completions", **body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert math.isfinite(json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["days"])
