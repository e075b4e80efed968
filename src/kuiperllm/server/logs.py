"""Log records as lines: text for people, or a JSON object each, with the request that they concern."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str | None] = ContextVar("kuiperllm_request_id", default=None)
"""The id of the request that is being answered."""

access = logging.getLogger("kuiperllm.server.access")
"""One record for each answer; its attribute `fields` holds what is worth searching for."""


class TextLines(logging.Formatter):
    """`12:30:01 INFO server.access [req-1]: POST /v1/completions 200 0.513 s`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback if there is one."""
        about = f" [{found}]" if (found := _request_of(record)) else ""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        name = record.name.removeprefix("kuiperllm.")
        line = f"{time} {record.levelname} {name}{about}: {_one_line(record.getMessage())}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


class JsonLines(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, `request_id`, a record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if found := _request_of(record):
            entry["request_id"] = found
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def _request_of(record: logging.LogRecord) -> str | None:
    fields = getattr(record, "fields", {})
    return None if "request_id" in fields else request_id.get()


def _one_line(text: str) -> str:
    """Without control characters: nobody forges a line of the log by way of a path."""
    return "".join(char if char.isprintable() else "?" for char in text)


def set_up(log_format: str, verbosity: int = 0) -> None:
    """Let the server's log go to stderr; verbosity 1: all that the package has to say, 2: everything."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    package = logging.getLogger("kuiperllm")
    package.handlers = [handler]
    package.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    logging.getLogger("kuiperllm.server").setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if verbosity else logging.ERROR)
