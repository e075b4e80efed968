"""The child's side of the worker protocol: one JSON object per line on stdin, one answer per line on stdout.

A request is `{"cmd": NAME, ...}`; the other fields are keyword arguments of the engine's method NAME. The
answer is `{"ok": RESULT}` or `{"error": TEXT}`. The loop ends with stdin. Imports the standard library only,
because every engine's worker runs in its own environment.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

COMMANDS = ("info", "load", "prefill", "decode", "read_bandwidth", "unload")


def serve(engine: Any) -> None:
    """Answer requests with `engine`'s methods until stdin closes.

    The real stdout is set aside for the answers, and file descriptor 1 leads to stderr, so that nothing a
    native library prints can get in between.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("cmd")
        try:
            if command not in COMMANDS or not hasattr(engine, command):
                raise ValueError(f"this worker has no command {command!r}")
            answer = {"ok": getattr(engine, command)(**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
