"""What clients do wrong gets the right status and OpenAI's form of an error; the server goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live import Live

from kuiperllm.server.protocol.common import ErrorAnswer

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def chain(length: int) -> dict[str, Any]:
    """References that lead from one to the next: what follows them by recursion needs a stack as deep."""
    links = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{length}": {"type": "null"}}}


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def of_form(**form: Any) -> dict[str, Any]:
    return {"structured_outputs": form}


CHAT_CASES: list[tuple[dict[str, Any], int, str | None]] = [
    # what is missing, unknown, or of the wrong type
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0"),
    ({"messages": [{"content": "x"}]}, 400, "messages.0"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.user.content"),
    ({"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.user.content.str"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        None,
    ),
    ({"nonsense": 1}, 400, "nonsense"),
    ({"functions": []}, 400, "functions"),
    ({"model": "gpt-5"}, 404, "model"),
    ({"model": 5}, 400, "model"),
    ({"temperature": "1"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"stream": "yes"}, 400, "stream"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"seed": "x"}, 400, "seed"),
    # numbers out of range
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -5}, 400, "max_tokens"),
    ({"max_completion_tokens": 10**30}, 400, "max_completion_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": 1e999}, 400, None),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.1}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"n": 0}, 400, "n"),
    ({"n": 10**6}, 400, "n"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"seed": 2**70}, 400, "seed"),
    ({"min_tokens": 9, "max_tokens": 3}, 400, None),
    ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"stop": ""}, 400, None),
    ({"stop": ["x"] * 100}, 400, None),
    ({"stop": ["x" * 5000]}, 400, None),
    ({"logit_bias": {"x": 1}}, 400, None),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias.5"),
    ({"logit_bias": {"999999": 1}}, 400, None),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids.0"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"bad": True}}, 400, "stream_options.bad"),
    # forms that cannot be met, are not valid, or are too large
    (of_form(regex="((("), 400, None),
    (of_form(regex="a" * 20_000), 400, None),
    (of_form(regex="(" * 5000 + ")" * 5000), 400, None),
    (of_form(regex=r"(a)\1"), 400, None),
    (of_form(regex=r"[^\s\S]"), 400, None),
    (of_form(grammar="start: nowhere"), 400, None),
    (of_form(grammar="start: start"), 400, None),
    (of_form(grammar="\n".join(f"r{i}: r{i + 1}" for i in range(9000))), 400, None),
    (of_form(grammar="start: " + "(" * 20_000 + '"a"' + ")" * 20_000), 400, None),
    (of_form(choice=[]), 400, None),
    (of_form(choice=["x" * 1000] * 100), 400, None),
    (of_form(), 400, None),
    (of_form(regex="a", choice=["b"]), 400, None),
    (of_form(json=False), 400, None),
    (of_schema({"type": "integer", "minimum": 5, "maximum": 1}), 400, None),
    (of_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), 400, None),
    (of_schema({"type": "strin"}), 400, None),
    (of_schema({"$ref": "#/$defs/missing"}), 400, None),
    (of_schema({"$ref": "https://example.com/schema.json"}), 400, None),
    (of_schema({"$ref": "#"}), 400, None),
    (of_schema(deep(120)), 400, None),
    (of_schema(chain(6000)), 400, None),
    (of_schema({"enum": [f"value {i}" for i in range(30_000)]}), 400, None),
    (of_schema({"type": "integer", "multipleOf": 999_999_937}), 400, None),
    (of_schema({"type": "number", "multipleOf": 1.2345678}), 400, None),
    (of_schema({"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}), 400, None),
    (
        of_schema({"type": "object", "patternProperties": {f"^k{i}[a-z]*$": {} for i in range(500)}}),
        400,
        None,
    ),
    (of_schema({"oneOf": [{"type": "integer"}, {"minimum": 3}]}), 400, None),
    (of_form(grammar='start: %json {"type": "integer", "multipleOf": 999999937}'), 400, None),
    (of_schema({"type": "object", "properties": {f"p{i}": {} for i in range(12_000)}}), 400, None),
    (of_schema(7), 400, None),
    ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema.json_schema"),
    ({**of_form(regex="a"), "response_format": {"type": "json_object"}}, 400, "structured_outputs"),
    # tools
    ({"tools": [TOOL]}, 400, "tools"),  # the template knows none
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "tool_choice"),
    ({"tools": [TOOL, TOOL]}, 400, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools.0.function.name"),
    ({"tools": [TOOL] * 200}, 400, "tools"),
    # the template
    ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
    ({"messages": [{"role": "tool", "content": "x"}], "chat_template_kwargs": {"bos_token": 5}}, 400, None),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}],
                }
            ]
        },
        400,
        "messages.0.tool_calls.0.function.arguments",
    ),
    # too long
    ({"messages": [{"role": "user", "content": "long " * 1000}]}, 400, None),
]


@pytest.mark.parametrize("case", range(len(CHAT_CASES)))
@pytest.mark.parametrize("stream", [False, True])
def test_chat_refuses(live: Live, case: int, stream: bool) -> None:
    fields, status, param = CHAT_CASES[case]
    body = {"messages": MESSAGES, "max_tokens": 4, "stream": stream} | fields
    if stream and ("stream" in fields or "stream_options" in fields):
        pytest.skip("the case says whether it streams")
    check(live.http.post(CHAT, content=json.dumps(body), headers=JSON), status, param)


JSON = {"Content-Type": "application/json"}


def check(response: Any, status: int, param: str | None = None, code: str | None = None) -> None:
    assert response.status_code == status, response.text[:500]
    error = ErrorAnswer.model_validate_json(response.content).error
    assert error.message
    assert "\n" not in error.message
    assert len(error.message) < 600
    if param is not None:
        assert error.param == param
    if code is not None:
        assert error.code == code
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": None}, 400, None),
        ({"prompt": []}, 400, None),
        ({"prompt": [[]]}, 400, None),
        ({"prompt": ["a", 5]}, 400, None),
        ({"prompt": [-1]}, 400, None),
        ({"prompt": [261]}, 400, None),
        ({"prompt": [1.5]}, 400, None),
        ({"prompt": ["x"] * 300}, 400, "prompt"),
        ({"prompt": ["x"] * 10, "n": 100}, 400, "n"),
        ({"prompt": "long " * 1000}, 400, None),
        ({"prompt": [97] * 1024}, 400, None),
        ({"suffix": "x"}, 400, "suffix"),
        ({"best_of": 2, "n": 3}, 400, "best_of"),
        ({"best_of": 3, "stream": True}, 400, "best_of"),
        ({"logprobs": 101}, 400, "logprobs"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"messages": MESSAGES}, 400, "messages"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_completions_refuse(live: Live, fields: dict[str, Any], status: int, param: str | None) -> None:
    check(live.post(TEXT, **{"prompt": "a", "max_tokens": 4} | fields), status, param)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (EMBED, {}, 400),
        (EMBED, {"input": ""}, 200),  # the token that begins a text is one
        (EMBED, {"input": []}, 400),
        (EMBED, {"input": "x", "dimensions": 3}, 400),
        (EMBED, {"input": "x", "encoding_format": "int8"}, 400),
        (EMBED, {"input": "long " * 1000}, 400),
        (EMBED, {"input": ["x"] * 500}, 400),
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/detokenize", {"tokens": [5000]}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/detokenize", {"tokens": []}, 200),
    ],
)
def test_other_endpoints_refuse(live: Live, path: str, body: dict[str, Any], status: int) -> None:
    response = live.post(path, **body)
    if status == 200:
        assert response.status_code == 200
    else:
        check(response, status)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"messages": "\xc3"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a\xed\xa0\x80"}]}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity, "messages": []}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"chat_template_kwargs": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
        b"1" * 10_000,
        b'{"seed": ' + b"1" * 10_000 + b"}",
        b'{"messages": []} x',
        b"\0" * 1000,
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, EMBED, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(live: Live, content: bytes, path: str) -> None:
    check(live.http.post(path, content=content, headers=JSON), 400)


def test_keys_that_occur_twice_and_deep_values_do_no_harm(live: Live) -> None:
    content = b'{"max_tokens": 2, "max_tokens": 3, "messages": [{"role": "user", "content": "x"}]}'
    response = live.http.post(CHAT, content=content, headers=JSON)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_other_types_of_body(live: Live, kind: str) -> None:
    content = json.dumps({"messages": MESSAGES, "max_tokens": 1})
    check(live.http.post(CHAT, content=content, headers={"Content-Type": kind} if kind else {}), 415)


def test_unknown_paths_and_methods(live: Live) -> None:
    check(live.http.get("/v1/nothing"), 404)
    check(live.http.get("/static/../../secret"), 404)
    check(live.http.get("/static/..%2f..%2fpyproject.toml"), 404)
    check(live.http.get(CHAT), 405)
    assert live.http.get(CHAT).headers["allow"] == "POST"
    check(live.http.request("PUT", "/health"), 405)


def test_codes_that_programs_look_for(live: Live) -> None:
    long = [{"role": "user", "content": "x" * 2000}]
    check(live.post(CHAT, messages=long), 400, code="context_length_exceeded")
    check(live.post(CHAT, messages=MESSAGES, model="x"), 404, code="model_not_found")
    check(live.post(CHAT, messages=MESSAGES, x=1), 400, code="unknown_field")
    check(live.http.post(CHAT, content=b"{", headers=JSON), 400, code="invalid_json")


CATASTROPHIC = [
    r"(a+)+$",
    r"(a|aa)+b",
    r"((a{1,1000}){1,1000}){1,1000}",
    r"(.*a){20}",
    r"(.|a){1,100}a.{30}b",
    r"([01]*1[01]{30}b)*",
    r"(.*a.{40}b)*",
    r"(.|\n)*x(.|\n){1,3000}y(.|\n){1,3000}z",
    r"(\p{L}{1,500}\p{N}{1,500}){3,50}",
]


@pytest.mark.parametrize("regex", CATASTROPHIC)
def test_catastrophic_regexes_end_in_time(live: Live, regex: str) -> None:
    """They are followed, or refused, at once or on the way; other requests are answered meanwhile."""
    response = live.post(TEXT, prompt="a", max_tokens=60, structured_outputs={"regex": regex})
    assert response.elapsed.total_seconds() < 5
    if response.status_code != 200:
        check(response, 400)


def test_a_template_that_fails(start: Any) -> None:
    """A template that raises, one that never ends, and one that does not understand the messages."""
    for source in (
        "{{ raise_exception('no') }}",
        "{% for i in range(10**6) %}{% for j in range(10**6) %}{% endfor %}{% endfor %}",
        "{{ messages[0].content.nothing.there }}",
        "{{ 'a' * 10**9 }}",
    ):
        server = start(chat_template=source)
        check(server.post(CHAT, messages=MESSAGES, max_tokens=2), 400)
        assert server.post(TEXT, prompt="a", max_tokens=2).status_code == 200
        server.assert_idle()
