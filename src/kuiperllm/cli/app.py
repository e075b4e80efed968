"""The commands of `kuiper`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Annotated

import typer

from kuiperllm.cli import bench, chat, compare, doctor, export, generate, info, perplexity, serve, tokenize
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


def _add(command: Callable[..., None], module: ModuleType) -> None:
    examples = "\n\n".join(f"  {line}" for line in module.EXAMPLES.splitlines())
    app.command(epilog=f"Examples:\n\n{examples}")(command)


_add(generate.generate, generate)
_add(chat.chat, chat)
_add(serve.serve, serve)
_add(info.info, info)
_add(tokenize.tokenize, tokenize)
_add(export.export, export)
_add(bench.bench, bench)
_add(perplexity.perplexity, perplexity)
_add(compare.compare, compare)
_add(doctor.doctor, doctor)
