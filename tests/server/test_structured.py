"""Grammars as masks: what is generated under them matches, whatever is drawn."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from kuiperllm import SamplingParams
from kuiperllm.engine.async_llm import AsyncLLM
from kuiperllm.engine.request import Guide
from kuiperllm.errors import UsageError
from kuiperllm.server.structured import Grammar, GrammarCompiler, any_of, json_schema, lark, regex
from kuiperllm.server.structured.schema import without_one_of
from kuiperllm.text import Tokenizer, load_tokenizer
from tiny_models import EOS

CLOSERS = [EOS, *b'"}]/5e']
"""What brings an output to its end, if it may come."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Any:
    made = GrammarCompiler(tokenizer, frozenset({EOS}))
    yield made
    made.close()


def compiled(compiler: GrammarCompiler, grammar: Grammar) -> Guide:
    return asyncio.run(compiler.compile(grammar))()


def allowed(guide: Guide, vocab_size: int) -> list[int]:
    bits = np.full(-(-vocab_size // 32), -1, np.int32)
    guide.fill(bits)
    return list(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")))


def walk(guide: Guide, tokenizer: Tokenizer, seed: int, patience: int = 60) -> str:
    """A random output of this grammar, which is brought to an end after a while."""
    rng = random.Random(seed)
    ids: list[int] = []
    while not guide.is_complete and len(ids) < 4000:
        choices = allowed(guide, tokenizer.vocab_size)
        assert choices, bytes(ids)
        closing = [token for token in CLOSERS if token in choices]
        hurry = closing and len(ids) > patience and rng.random() < 0.7
        token = closing[0] if hurry else int(rng.choice(choices))
        if token == EOS:
            guide.accept(token)
            break
        guide.accept(token)
        ids.append(token)
    assert len(ids) < 4000, "no end"
    return tokenizer.decode(ids)


# --- JSON schemas -----------------------------------------------------------------------------------------

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {
        "type": "array",
        "items": {"type": "number", "minimum": -2, "maximum": 3.5},
        "minItems": 1,
        "maxItems": 4,
    },
    {"type": "string", "pattern": "^[a-c]{2,4}-\\d+$"},
    {"type": "string", "format": "date"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"enum": [1, "two", None, [3]]},
    {"const": {"a": ["b"]}},
    {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    {"oneOf": [{"type": "null"}, {"type": "integer", "multipleOf": 7}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {
        "$defs": {
            "n": {"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}
        }
    }
    | {"$ref": "#/$defs/n"},
    {"type": "object", "patternProperties": {"^x": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {
        "type": "array",
        "prefixItems": [{"type": "string"}, {"type": "integer"}],
        "items": False,
        "minItems": 2,
    },
    {"type": ["string", "null"]},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_what_is_generated_matches_the_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    for seed in range(8):
        text = walk(compiled(compiler, json_schema(schema)), tokenizer, seed)
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.shared
def test_every_published_case_that_can_be_compiled(
    shared: Path, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """llama.cpp's table: 73 schemas, and 2 that are none."""
    cases = json.loads((shared / "json_schema" / "llama_cpp_schema_to_grammar.json").read_text())
    refused: dict[str, str] = {}
    for case in cases:
        try:
            schema = json.loads(case["schema"])
            guide = asyncio.run(compiler.compile(json_schema(schema)))
        except (ValueError, UsageError) as error:
            refused[case["name"]] = str(error)
            continue
        assert case["status"] == "SUCCESS", case["name"]
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft7Validator)
        check = kind(schema, format_checker=jsonschema.FormatChecker())
        for seed in range(6):
            text = walk(guide(), tokenizer, seed)
            assert check.is_valid(json.loads(text)), (case["name"], text)
    print(refused)
    assert len(cases) - len(refused) >= 70, refused


def test_one_of_is_any_of_where_alternatives_exclude_each_other() -> None:
    def union(first: Any, second: Any) -> bool:
        return "anyOf" in without_one_of({"oneOf": [first, second]})

    cat = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
    dog = {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"]}
    wolf = {"type": "object", "properties": {"kind": {"const": "wolf"}}, "required": ["kind"]}
    maybe = {"type": "object", "properties": {"kind": {"const": "dog"}}}
    assert union(cat, dog)
    assert not union(dog, wolf)
    assert not union(cat, maybe)
    assert union({"type": "string"}, {"type": ["integer", "null"]})
    assert not union({"type": "number"}, {"type": "integer"})
    assert not union({"type": "string"}, {})
    nested = {
        "properties": {"p": {"oneOf": [{"$ref": "#/$defs/c"}, {"$ref": "#/$defs/d"}]}},
        "$defs": {"c": cat, "d": dog},
    }
    assert "anyOf" in without_one_of(nested)["properties"]["p"]
    assert without_one_of(nested)["$defs"] == nested["$defs"]
    loop = {
        "oneOf": [{"$ref": "#/$defs/a"}, cat],
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    }
    assert without_one_of(loop) == loop


# --- other forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [r"\d{3}-\d{4}", r"(yes|no)!?", r"[^a-z]{5}", r"a/b\\c", "x\ny", r"(?i:ab)+c", r"[^\x00-\x7f]{2}"],
)
def test_regex(compiler: GrammarCompiler, tokenizer: Tokenizer, pattern: str) -> None:
    for seed in range(8):
        text = walk(compiled(compiler, regex(pattern)), tokenizer, seed)
        assert re.fullmatch(pattern, text), text


def test_choice(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    texts = ["one", "two", 'th"ree', "vi\ner", "fünf"]
    made = {walk(compiled(compiler, any_of(texts)), tokenizer, seed) for seed in range(60)}
    assert made == set(texts)


def test_grammar_counts_what_no_regex_can(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = lark('start: "a" start "b" | "x"')
    for seed in range(8):
        text = walk(compiled(compiler, grammar), tokenizer, seed)
        assert re.fullmatch(r"(a*)x(b*)", text)
        assert text.count("a") == text.count("b")


def test_masks_of_other_sizes(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """A model may have more rows than the tokenizer has tokens, or fewer."""
    guide = compiled(compiler, regex("[ab]"))
    for size in (tokenizer.vocab_size + 200, tokenizer.vocab_size, 128):
        assert allowed(guide, size) == [ord("a"), ord("b")]


def test_guides_do_not_share_state(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    make = asyncio.run(compiler.compile(regex("[ab]{2}")))
    first, second = make(), make()
    first.accept(ord("a"))
    first.accept(ord("b"))
    assert first.is_complete
    assert not second.is_complete
    assert allowed(second, tokenizer.vocab_size) == [ord("a"), ord("b")]


def test_a_token_that_is_not_allowed_is_an_error(compiler: GrammarCompiler) -> None:
    guide = compiled(compiler, regex("[ab]{2}"))
    with pytest.raises(UsageError, match="grammar"):
        guide.accept(ord("x"))


def test_compiling_in_vain_costs_one_line(compiler: GrammarCompiler) -> None:
    for text in ("start: foo", "start: /((/", "%ignore", "", "x"):
        with pytest.raises(UsageError) as caught:
            asyncio.run(compiler.compile(lark(text)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("links", [10, 300, 998])
def test_long_chains_of_references_do_not_end_the_process(compiler: GrammarCompiler, links: int) -> None:
    rules = [f'r{i}: "(" r{i + 1} ")"' for i in range(links)]
    text = "\n".join(["start: r0", *rules, f'r{links}: "x"'])
    guide = compiled(compiler, lark(text))
    guide.accept(ord("("))
    terminals = re.sub(r"\br(\d+)", r"R\1", text)
    compiled(compiler, lark(terminals)).accept(ord("("))


# --- with a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 2, "seed": 4, "top_k": 3},
        {"seed": 5, "top_p": 0.05},
        {"seed": 6, "min_p": 0.9, "repetition_penalty": 3},
        {
            "seed": 7,
            "logit_bias": {ord("q"): 100, ord("{"): -100},
            "presence_penalty": 2,
            "frequency_penalty": 2,
        },
        {"seed": 8, "min_tokens": 30},
        {"seed": 9, "n": 3},
    ],
    ids=str,
)
def test_the_engine_keeps_to_it_with_any_sampling(
    tiny_model: Path, compiler: GrammarCompiler, sampling: dict[str, Any]
) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }

    async def run() -> list[Any]:
        make_guide = await compiler.compile(json_schema(schema))
        async with AsyncLLM(tiny_model, max_num_seqs=4) as llm:
            params = SamplingParams(max_tokens=600, **sampling)
            guided = [llm.complete("a", params, make_guide=make_guide) for _ in range(2)]
            free = llm.complete("a", SamplingParams(temperature=0, max_tokens=20))
            alone = llm.complete("a", SamplingParams(temperature=0, max_tokens=20))
            *found, mixed = await asyncio.gather(*guided, free)
            assert mixed[0].token_ids == (await alone)[0].token_ids  # nobody else is bent
            return found

    for outputs in asyncio.run(run()):
        for completion in outputs:
            assert completion.finish_reason == "stop"
            jsonschema.validate(json.loads(completion.text), schema)
