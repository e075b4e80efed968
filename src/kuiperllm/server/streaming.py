"""Answers that are cut short when nobody waits for them any more: server-sent events, and whole ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kuiperllm.server.errors import as_api_error
from kuiperllm.server.middleware import ClientGoneError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
_HEARTBEAT = b": waiting\n\n"


def event(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + to_json(value) + b"\n\n"


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled as soon as the client goes away.

    The request's body must have been read.

    Raises:
        ClientGoneError: it did.
    """
    return await _unless_left(request.receive, work)


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGoneError
    finally:
        leaving.cancel()
        doing.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, with a comment now and then where there is nothing to say.

    What goes wrong on the way is an event with an `error`.

    Args:
        events: whole events.
        close: called at the end, and at once when the client goes away.
        heartbeat_s: how long there may be nothing.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]], heartbeat_s: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._heartbeat_s = heartbeat_s
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            await _unless_left(receive, self._send_all(send))
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        beating = asyncio.ensure_future(self._beat(send))
        try:
            async for data in self._events:
                self._sent += 1
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            await self._send_error(send, error)
        finally:
            beating.cancel()
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_error(self, send: Send, error: Exception) -> None:
        body = event(as_api_error(error).body()) + DONE
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _beat(self, send: Send) -> None:
        seen = -1
        while True:
            await asyncio.sleep(self._heartbeat_s)
            if seen == self._sent:
                await send({"type": "http.response.body", "body": _HEARTBEAT, "more_body": True})
            seen = self._sent
