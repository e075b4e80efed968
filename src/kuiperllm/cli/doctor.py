"""`kuiper doctor`: whether kuiperllm can run here, what it found, and how to mend what is missing."""

from __future__ import annotations

from dataclasses import asdict

import typer

from kuiperllm.cli.interrupts import postponed
from kuiperllm.cli.options import Json, Verbose
from kuiperllm.cli.output import print_json, print_table, write
from kuiperllm.cli.progress import Reporter

EXAMPLES = """\
kuiper doctor
kuiper doctor --json
"""


def doctor(as_json: Json = False, verbose: Verbose = 0) -> None:
    """Show what this machine has to offer. The exit code is 1 if something that is needed is missing."""
    with postponed(), Reporter():
        from kuiperllm.cli.diagnosis import diagnose

        findings = diagnose()
    problems = [finding for finding in findings if finding.problem is not None]
    can_run = not any(finding.fatal for finding in problems)
    if as_json:
        print_json({"can_run": can_run, "findings": [asdict(finding) for finding in findings]})
    else:
        print_table((finding.name, finding.value) for finding in findings)
        for finding in problems:
            write(f"\n{finding.name}: {finding.problem}\n")
            if finding.fix is not None:
                write(f"  to mend it: {finding.fix}\n")
        write("\nkuiperllm can run here.\n" if can_run else "\nkuiperllm cannot run here yet.\n")
    if not can_run:
        raise typer.Exit(1)
