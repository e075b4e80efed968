"""What an output may look like, as text that llguidance reads: Lark's syntax with its extensions.

Grammars come from strangers, so their size is bounded here: llguidance follows references by recursion, and a
chain of a hundred thousand would run off the end of any stack. What takes much time or memory without being
large is bounded by its own limits, see `compiler`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from kuiperllm.errors import UsageError
from kuiperllm.server.structured.schema import Schema, check_schema, without_one_of

MAX_SCHEMA_CHARACTERS = 256 << 10
MAX_GRAMMAR_CHARACTERS = 64 << 10
MAX_REGEX_CHARACTERS = 16 << 10
MAX_RULES = 1000

_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,20})"}
"""Between the parts of JSON: nothing, a blank, or a new line with some indentation. Without a bound, a model
that likes blanks never gets to an end."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in Lark's syntax, in pieces that can be put inside another one."""

    start: str
    """The right side of the first rule."""
    rules: tuple[str, ...] = ()
    """Whole rules that the first one refers to."""
    nested: str | None = None
    """A grammar with names of its own, which the rules call `@nested`."""

    def text(self) -> str:
        """What llguidance reads."""
        main = "\n".join((f"start: {self.start}", *self.rules))
        if self.nested is None:
            return main
        grammars = ({"name": "main", "lark_grammar": main}, {"name": "nested", "lark_grammar": self.nested})
        return json.dumps({"grammars": grammars})

    def behind(self, start: str, *rules: str) -> Grammar:
        """This grammar, after something else."""
        return Grammar(f"{start} ({self.start})", (*rules, *self.rules), self.nested)


def literal(text: str) -> str:
    """A text as it stands, for use in a rule."""
    return json.dumps(text) if text else '""'


def json_value(schema: Schema | bool) -> str:
    """JSON that matches a schema, for use in a rule.

    Raises:
        UsageError: the schema is too large, or matches nothing.
    """
    if schema is False:
        raise UsageError("no JSON matches the schema false")
    plain: Schema = {} if schema is True else schema
    check_schema(plain)
    text = json.dumps(without_one_of(plain) | {"x-guidance": _JSON_OPTIONS})
    _check_size("the JSON schema", text, MAX_SCHEMA_CHARACTERS)
    return f"%json {text}"


def json_schema(schema: Schema | bool) -> Grammar:
    """JSON that matches a schema. Raises like `json_value`."""
    return Grammar(json_value(schema))


def json_object() -> Grammar:
    """Some JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Grammar:
    """What a regular expression matches from beginning to end.

    Raises:
        UsageError: it is too long.
    """
    _check_size("the regex", pattern, MAX_REGEX_CHARACTERS)
    from llguidance import regex_to_lark

    return Grammar(f"/{regex_to_lark(pattern, '').replace(chr(10), chr(92) + 'n')}/")


def any_of(texts: Sequence[str]) -> Grammar:
    """One of some texts.

    Raises:
        UsageError: they are too long together.
    """
    rule = " | ".join(map(literal, texts))
    _check_size("the choices", rule, MAX_GRAMMAR_CHARACTERS)
    return Grammar(rule)


def lark(text: str) -> Grammar:
    """What a grammar in Lark's syntax matches; its first rule is `start`.

    Raises:
        UsageError: it is too long or has too many rules.
    """
    _check_size("the grammar", text, MAX_GRAMMAR_CHARACTERS)
    if "%json" in text:  # its schema would have to be checked
        raise UsageError("the grammar must not hold %json; ask for a JSON schema, or spell it out")
    if text.count(":") > MAX_RULES:
        raise UsageError(f"the grammar has more than {MAX_RULES} rules")
    return Grammar("@nested", nested=text)


def _check_size(what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise UsageError(f"{what} has {len(text)} characters; {most} are possible")
