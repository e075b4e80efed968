"""`kuiper tokenize`: text to token ids and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kuiperllm.cli.interrupts import import_engine
from kuiperllm.cli.options import Json, ModelOptions, Verbose, with_option_groups
from kuiperllm.cli.output import print_json, print_table, write
from kuiperllm.cli.progress import Reporter
from kuiperllm.cli.streaming import token_text
from kuiperllm.cli.text_input import read_text
from kuiperllm.errors import UsageError

if TYPE_CHECKING:
    from kuiperllm.text import Tokenizer

EXAMPLES = """\
kuiper tokenize "Shall I compare thee?"
kuiper tokenize --tokenizer tokenizer.json --special --json "<|im_start|>user"
kuiper tokenize -m model.gguf --decode "1 15043 3186"
"""


@with_option_groups
def tokenize(
    model: ModelOptions,
    text: Annotated[
        str | None,
        typer.Argument(help="The text; - or nothing reads standard input.", show_default=False),
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Take special tokens in the text for what they are.")
    ] = False,
    decode: Annotated[
        str | None,
        typer.Option(metavar="IDS", show_default=False, help='Print the text of these ids, such as "1 2 3".'),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Show the tokens of a text: id and text of each. No weights are loaded."""
    if decode is not None and text is not None:
        raise UsageError("give either a text or --decode, not both")
    ids = None if decode is None else _parse_ids(decode)
    source = read_text(text, "text") if ids is None else ""
    with Reporter() as reporter:
        tokenizer = _open(model, reporter)
    if ids is not None:
        decoded = tokenizer.decode(ids, skip_special_tokens=not special)
        if as_json:
            print_json({"text": decoded, "ids": ids})
        else:
            write(decoded + "\n")
        return
    ids = tokenizer.encode(source, parse_special=special)
    tokens = [token_text(token_id, tokenizer) for token_id in ids]
    if as_json:
        print_json({"tokenizer": tokenizer.kind, "count": len(ids), "ids": ids, "tokens": tokens})
    else:
        print_table((f"{i:>7}", repr(token)) for i, token in zip(ids, tokens, strict=True))


def _open(model: ModelOptions, reporter: Reporter) -> Tokenizer:
    import_engine()
    if model.tokenizer is not None:
        from kuiperllm.text import load_tokenizer

        return load_tokenizer(Path(model.tokenizer))
    from kuiperllm.engine.loading import open_model, open_tokenizer

    with open_model(model.model, reporter.advance) as checkpoint:
        return open_tokenizer(checkpoint)


def _parse_ids(text: str) -> list[int]:
    words = [word for word in re.split(r"[\s,\[\]]+", text) if word]
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) < 10):
            raise UsageError(f"--decode: {word[:40]!r} is no token id; give whole numbers")
    return [int(word) for word in words]
