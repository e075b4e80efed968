"""The command line, `kuiper`: reads options, calls the engine, prints. No logic of the engine lives here.

Modules import what is heavy inside their functions: `kuiper --help` loads neither NumPy nor LLVM.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those after the command's name; None: the process's own.

    Returns:
        The exit code: 0, 1 for failures, 2 for usage errors, 130 after Ctrl-C.
    """
    try:
        from kuiperllm.cli.interrupts import postponed

        with postponed():
            from kuiperllm.cli.run import run
        code = run(arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED and arguments is None:
        # Another Ctrl-C while Python ends would make it another exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code
