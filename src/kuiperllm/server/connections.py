"""Bounds for connections, which uvicorn leaves to a proxy in front: how many, how slow, how long a head."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from kuiperllm.server.errors import RETRY_AFTER_S, unavailable

if TYPE_CHECKING:
    from kuiperllm.server.config import ServerConfig

_MOST_HEAD_BYTES = 64 << 10
_DISCARDED = 8
"""A body that was refused may be so many times too large before its connection is cut: who still sends does
not read the answer yet, and a cut would lose it."""


def bounded_protocol(config: ServerConfig) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which closes connections that take up a place and do nothing with it.

    A client must send the head of a request within `read_timeout_s`, in 64 KiB, and take what it is sent:
    after `write_timeout_s` in which a full buffer does not move, the connection is cut, and the request given
    up.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return type("BoundedProtocol", (_Bounds, AutoHTTPProtocol), {"limits": config})


class _Bounds:
    """Put in front of one of uvicorn's protocols; uses its `transport`, `cycle`, `loop` and `connections`."""

    limits: ServerConfig
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    connections: set[Any]
    cycle: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        if len(self.connections) > self.limits.max_connections:
            transport.write(_too_many())
            transport.close()
        else:
            self._start("head", self.limits.read_timeout_s, transport.close)

    def connection_lost(self, error: Exception | None) -> None:
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(error)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before = self.cycle
        super().data_received(data)  # type: ignore[misc]
        if self.cycle is not None and (self.cycle is not before or not self.cycle.response_complete):
            self._stop("head")  # what comes now is a body, for which the application has a timeout
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        is_body = self.cycle is not None and self.cycle.more_body  # of a request that was answered already
        if self._head_bytes > (_DISCARDED * self.limits.max_body_bytes if is_body else _MOST_HEAD_BYTES):
            self.transport.close()
        elif "head" not in self._timers:
            self._start("head", self.limits.read_timeout_s, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._start("write", self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop("write")
        super().resume_writing()  # type: ignore[misc]

    def _start(self, name: str, seconds: float, action: Any) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, action)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


def _too_many() -> bytes:
    """A whole response that says so."""
    body = to_json(
        unavailable("too many connections are open; try again later", "too_many_connections").body()
    )
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Retry-After: {RETRY_AFTER_S}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
