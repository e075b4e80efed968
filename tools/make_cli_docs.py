"""Write docs/cli.md from the commands' help; with `--check`, only say whether it is current."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from kuiperllm.cli.app import app

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "cli.md"

HEADER = """\
# Command line

Made by `tools/make_cli_docs.py` from the commands' own help; do not edit.

Text goes to stdout, everything else to stderr. Exit codes: 0, 1 for failures, 2 for usage errors, 130 after
Ctrl-C. What went wrong is one line; `-v` adds the log and the traceback.

Environment: `KUIPER_CACHE_DIR` (folder for compiled kernels), `KUIPER_CPU_LEVEL` (use kernels of at most this
level: `generic`, `avx2`, `avx512`, `amx`), `KUIPER_NUM_THREADS`; `CUDA_VISIBLE_DEVICES` (the GPUs that may be
used); for downloads `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`.

`kuiper --version` prints the version; `kuiper --install-completion` sets up completion for the shell.
"""


def document() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    commands = list(_flat(group.commands))
    sections = ["".join(_section(name, command)).strip() for name, command in commands]
    return "\n\n".join([HEADER.strip(), *sections]) + "\n"


def _flat(commands: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All commands with their whole names, those inside others too."""
    for name, command in commands.items():
        yield prefix + name, command
        yield from _flat(getattr(command, "commands", {}), f"{prefix}{name} ")


def _section(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["kuiper", name, "[OPTIONS]", *map(_placeholder, arguments)])
    yield f"## kuiper {name}\n\n{' '.join(command.help.split())}\n\n"
    yield f"```text\n{usage}\n```\n\n"
    examples = [line.strip() for line in (command.epilog or "").splitlines()[1:] if line.strip()]
    if examples:
        yield "```console\n" + "\n".join(examples) + "\n```\n\n"
    for parameter in arguments:
        yield f"`{parameter.metavar or parameter.name.upper()}`: {_text(parameter.help)}\n\n"
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for panel, members in panels.items():
        yield f"| {panel} | |\n| --- | --- |\n"
        yield from (f"| {_names(option)} | {_text(option.help)}{_default(option)} |\n" for option in members)
        yield "\n"


def _placeholder(argument: Any) -> str:
    """How an argument stands in the line of usage."""
    if argument.metavar:
        return str(argument.metavar)
    return argument.name.upper() if argument.required else f"[{argument.name.upper()}]"


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    takes_value = not (option.is_flag or option.count)
    return f"{names} {option.metavar}" if takes_value and option.metavar else names


def _default(option: Any) -> str:
    if option.show_default and not option.is_flag and option.default is not None:
        return f" Default: {option.default}."
    return ""


def _text(help_text: str | None) -> str:
    return " ".join((help_text or "").split()).replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` say whether it is current; the exit code."""
    text = document()
    if arguments == ["--check"]:
        current = OUTPUT.is_file() and OUTPUT.read_text(encoding="utf-8") == text
        print("docs/cli.md is current" if current else "docs/cli.md is stale: run tools/make_cli_docs.py")
        return 0 if current else 1
    OUTPUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
