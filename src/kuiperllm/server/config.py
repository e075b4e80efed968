"""How the server behaves, read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kuiperllm.errors import UsageError

TOOL_FORMATS = ("auto", "hermes", "llama3", "none")
REASONING_FORMATS = ("auto", "think", "none")
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the server behaves.

    Raises:
        UsageError: a value is unknown or out of range, or a file is not there.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    model_names: tuple[str, ...] = ()
    """What requests may call the model; the first is what answers call it. Empty: the name of the model."""
    api_keys: tuple[str, ...] = ()
    """Bearer tokens; all but health, metrics and the page need one of them. Empty: nothing does."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the API (CORS); `*` is any. The chat page itself needs none."""
    max_waiting: int = 1024
    """Most requests that may wait for their first turn; beyond, they are answered 503."""
    max_connections: int = 4096
    """Most open connections; beyond, requests are answered 503."""
    max_body_bytes: int = 16 << 20
    max_prompts: int = 256
    """Most prompts of one request."""
    max_outputs: int = 512
    """Most outputs of one request, all prompts together."""
    read_timeout_s: float = 30.0
    """A client has this long for the head of a request, and again for its body."""
    write_timeout_s: float = 60.0
    """A client that takes nothing from its connection for so long is given up."""
    heartbeat_s: float = 15.0
    """A stream that has nothing to say sends a comment so often, for proxies that would close it."""
    drain_timeout_s: float = 30.0
    """How long requests under way may take to end after a signal to stop."""
    chat_template: str | None = None
    """Jinja source that replaces the model's own."""
    tool_format: str = "auto"
    """How the model writes calls of functions; `auto` looks at its chat template. One of `TOOL_FORMATS`."""
    reasoning_format: str = "auto"
    """Whether `<think>` ... `</think>` is told apart from the answer. One of `REASONING_FORMATS`."""
    page: bool = True
    """Whether there is a chat page at `/`."""
    log_format: str = "text"
    """One of `LOG_FORMATS`; `json` is one object a line."""
    tls_certificate: Path | None = None
    """PEM file of the certificate, and those that signed it; with `tls_key`, connections are encrypted."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port must be 0 to 65535, not {self.port}")
        whole = ("max_waiting", "max_connections", "max_body_bytes", "max_prompts", "max_outputs")
        for name in whole:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("read_timeout_s", "write_timeout_s", "heartbeat_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
        if not self.drain_timeout_s >= 0:
            raise UsageError(f"drain_timeout_s must be 0 or above, not {self.drain_timeout_s}")
        self._require_known("tool_format", TOOL_FORMATS)
        self._require_known("reasoning_format", REASONING_FORMATS)
        self._require_known("log_format", LOG_FORMATS)
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise UsageError("an API key must be printable ASCII without blanks, and not empty")
        if any(not name or not name.isprintable() for name in self.model_names):
            raise UsageError("a model's name must be printable, and not empty")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UsageError("a TLS certificate and its key go together")
        for path in (self.tls_certificate, self.tls_key):
            if path is not None and not path.is_file():
                raise UsageError(f"{path}: there is no such file")

    def _require_known(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise UsageError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
