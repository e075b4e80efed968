"""The commands of `kuiper`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Annotated

import typer

from kuiperllm.cli import (
    bench,
    bench_serve,
    chat,
    compare,
    doctor,
    export,
    generate,
    info,
    perplexity,
    serve,
    tokenize,
)
from kuiperllm.cli.output import write

app = typer.Typer(
    help="Run language models of the Llama and Qwen families.",
    epilog="Start here: kuiper generate 'ROMEO:'",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        write(f"kuiper {version('kuiperllm')}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def kuiper(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run language models of the Llama and Qwen families on this machine."""
    if context.invoked_subcommand is None:
        write(context.get_help())


def _examples(module: ModuleType) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in module.EXAMPLES.splitlines())


def _add(command: Callable[..., None], module: ModuleType, group: typer.Typer = app) -> None:
    group.command(epilog=_examples(module))(command)


def _bench_group() -> typer.Typer:
    """`kuiper bench` measures by itself, and has commands that measure other things."""
    group = typer.Typer(invoke_without_command=True, epilog=_examples(bench))
    group.callback()(bench.bench)
    _add(bench_serve.serve, bench_serve, group)
    return group


_add(generate.generate, generate)
_add(chat.chat, chat)
_add(serve.serve, serve)
_add(info.info, info)
_add(tokenize.tokenize, tokenize)
_add(export.export, export)
app.add_typer(_bench_group(), name="bench")
_add(perplexity.perplexity, perplexity)
_add(compare.compare, compare)
_add(doctor.doctor, doctor)
