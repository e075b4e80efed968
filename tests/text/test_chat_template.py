"""Chat templates: the dialect, the errors, and the bounds on hostile ones."""

# ruff: noqa: E501
from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.errors import ChatTemplateError
from kuiperllm.text import ChatTemplate, chat_template

HI = [{"role": "user", "content": "hi"}]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def render(source: str, messages: Any = HI, **kwargs: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **kwargs)


def test_a_plain_template() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>hi</s>"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ {'b': '<é>&\\'', 'a': [1, none]} | tojson }}", '{"b": "<é>&\'", "a": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": 2\n}'),
        ("{{ [1] | tojson(ensure_ascii=true, separators=(',', ':')) }}", "[1]"),
        ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% generation %}a{% set x = 'b' %}{% endgeneration %}{{ x }}", "ab"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.index0 }}{% endfor %}", "TrueTrue10"),
        ("{% macro f(x, y='!') %}{{ x ~ y }}{% endmacro %}{{ f('a') }}{{ f('b', y=1) }}", "a!b1"),
        ("{% set x %}{{ 'a' ~ 1 }}{% endset %}{{ x * 3 }}", "a1a1a1"),
        ("{{ messages[::-1] | length }}{{ 'abc'[1:] }}{{ 'a,b'.split(',') | last }}", "1bcb"),
        ("{{ 'a-b'.replace('-', '+') }}{{ 'x' | replace('x', 'y') | upper }}{{ [1, 2] | join('/') }}", "a+bY1/2"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}", "['hi']"),
        ("{{ 'a\\nb' | indent(2) }}{{ '%s-%02d' % ('a', 3) }}{{ '{:>3}'.format(1) }}", "a\n  ba-03  1"),
        ("{{ tools is none }}{{ tools }}{{ nothing }}", "TrueNone"),
        ("{{ 7 % 4 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ 2 + 3 }}", "31024125"),
        ("{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}{% for k, v in {'a': 1}.items() %}{{ k }}{% endfor %}", "a1a"),
    ],
)  # fmt: skip
def test_the_dialect(source: str, expected: str) -> None:
    assert render(source) == expected


def test_tools_and_other_variables() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert render("{{ tools | tojson }}{{ thinking }}", tools=tools, thinking=1) == json.dumps(tools) + "1"


def test_the_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2024, 7, 26, 12)

    monkeypatch.setattr(chat_template, "datetime", Clock)
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    with pytest.raises(ChatTemplateError, match="width"):
        render("{{ strftime_now('%999999999d') }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "chat template, line 1: Expected"),
        ("a\nb {{ x", "line 2: "),
        ("{{ 'a' | nonsense }}", "No filter named 'nonsense'"),
        ("\n{{ raise_exception('roles must\nalternate') }}", "chat template, line 2: roles must alternate"),
        ("x\n\n{{ messages[0].content.nothing.more }}", "line 3: .*has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0] + 1 }}", "unsupported operand"),
        ("{% include 'x' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ '{0.__class__.x}'.format(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{" * 300_000, "300000 characters are too many"),
        ("{{" + "(" * 5000 + ")" * 5000 + "}}", "chat template"),
    ],
)
def test_errors_are_one_line_that_names_the_place(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message) as caught:
        render(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_messages_that_contain_themselves() -> None:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = message
    with pytest.raises(ChatTemplateError):
        render("{{ messages | tojson }}", [message])


DOUBLE = "{% set ns = namespace(x='ab', l=['ab']) %}{% for i in range(60) %}DO{% endfor %}{{ ns.x | length }}"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}X{% endfor %}{% endfor %}{% endfor %}"

HOSTILE = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "{{ range(10 ** 9) | list }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:0999999999d}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'.encode().zfill(10 ** 10) }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
    "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a\nb' | indent(10 ** 10) }}",
    "{{ [1] | tojson(indent=10 ** 10) }}",
    "{{ [1] | batch(10 ** 10, 0) | list }}",
    "{{ [1] | slice(10 ** 10) | list }}",
    "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "{{ 'a' * 100000 | replace('', 'b' * 100000) }}",
    "{{ ('b' * 100000).join('a' * 100000) }}",
    "{{ range(100000) | join('b' * 100000) }}",
    "{{ ('a' * 100000) | join('b' * 100000) }}",
    "{{ 'a'.translate({97: 'b' * 1000000}) }}",
    DOUBLE.replace("DO", "{% set ns.x = ns.x ~ ns.x %}"),
    DOUBLE.replace("DO", "{% set ns.x = ns.x + ns.x %}"),
    DOUBLE.replace("DO", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    DOUBLE.replace("DO", "{% set ns.x = ns.x.replace('a', ns.x) %}"),
    DOUBLE.replace("DO", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    DOUBLE.replace("DO", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    DOUBLE.replace("DO", "{% set ns.x = [ns.x, ns.x] | join %}"),
    DOUBLE.replace("DO", "{% set ns.l = ns.l + ns.l %}"),
    DOUBLE.replace("DO", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l | tojson }}",
    DOUBLE.replace("DO", "{% set ns.l = {'a': ns.l, 'b': ns.l} %}") + "{{ ns.l }}",
    DOUBLE.replace("DO", "{% set ns.l = (ns.l, ns.l) %}") + "{{ ns.l == ns.x }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(s) %}{{ f(s[1:]) }}{% endmacro %}{{ f('a' * 10000000) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    NESTED.replace("X", ""),
    NESTED.replace("X", "x"),
    "{{ lipsum(n=10 ** 9) }}",
    "{% filter replace('a', 'b' * 99999999) %}" + "a" * 9999 + "{% endfilter %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_runaway_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TIME_LIMIT_S", 1.0)
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 20_000_000)
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(ChatTemplateError):
            render(source)
        assert time.monotonic() - start < 5.0
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()


def test_long_conversations_fit_the_bounds() -> None:
    messages = [{"role": "user", "content": "word " * 2000} for _ in range(200)]
    assert len(render(CHATML, messages)) > 2_000_000
    growing = "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.content %}{% endfor %}{{ ns.t }}"
    assert len(render(growing, messages[:40])) == 400_000


FRAGMENTS = [
    *"{}%#-~|.[]()' \nab1+*",
    "{{",
    "}}",
    "{%",
    "%}",
    "for",
    " in ",
    "set",
    "if",
    "endif",
    "endfor",
    "messages",
]
FRAGMENTS += ["range(9)", "|tojson", "macro f()", "endmacro", "{% generation %}", "{{ messages", "[0]"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25))
def test_any_source_renders_or_fails_cleanly(parts: list[str]) -> None:
    with contextlib.suppress(ChatTemplateError):
        assert isinstance(render("".join(parts)), str)
