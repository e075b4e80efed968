"""Output that has to have a form: JSON schemas, regular expressions, grammars as masks over tokens."""

from kuiperllm.server.structured.compiler import GrammarCompiler
from kuiperllm.server.structured.grammar import (
    Grammar,
    any_of,
    json_object,
    json_schema,
    json_value,
    lark,
    literal,
    regex,
)

__all__ = [
    "Grammar",
    "GrammarCompiler",
    "any_of",
    "json_object",
    "json_schema",
    "json_value",
    "lark",
    "literal",
    "regex",
]
