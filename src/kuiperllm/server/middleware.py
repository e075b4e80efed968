"""What every request passes: an id, keys, limits, timeouts, a line in the log, numbers for the metrics.

Plain ASGI, two classes around the application: `Gate` on the outside, `Limits` for what comes and goes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kuiperllm.server import logs
from kuiperllm.server.errors import ApiError, as_api_error

if TYPE_CHECKING:
    from kuiperllm.server.config import ServerConfig
    from kuiperllm.server.metrics import Metrics

log = logging.getLogger(__name__)

_GIVEN_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_NEEDS_KEY = re.compile(r"/(v1/.*|v1|tokenize|detokenize)")
_CLIENT_GONE = 499
"""What the log calls an answer that nobody waited for, as nginx does."""


class ClientGoneError(Exception):
    """The client went away; there is nobody to answer."""


class Gate:
    """Gives each request an id, checks its key, logs and counts its answer, and lets no exception out.

    Args:
        app: what answers.
        config: the server's.
        metrics: what to count in.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self._app = app
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.api_keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), _CLIENT_GONE
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = name
        token = logs.request_id.set(name)

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        self._metrics.http_in_flight.inc()
        try:
            await self._answer(scope, receive, send_on, headers)
        except ClientGoneError:
            status = _CLIENT_GONE
        except asyncio.CancelledError:
            status = _CLIENT_GONE
            raise
        except Exception as error:
            if status != _CLIENT_GONE:  # too late to say so: the end that the client waits for never comes
                log.error("an answer broke off", exc_info=error)
                raise
            await as_api_error(error).response()(scope, receive, send_on)
        finally:
            self._metrics.http_in_flight.dec()
            self._finish(scope, status, time.perf_counter() - started)
            logs.request_id.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        if self._keys and scope["method"] != "OPTIONS" and _NEEDS_KEY.fullmatch(scope["path"]):
            kind, _, key = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
            known = [hmac.compare_digest(digest, one) for one in self._keys]  # all of them, in constant time
            if kind.lower() != "bearer" or not any(known):
                raise ApiError(
                    401,
                    "a valid API key is needed, as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http_requests.labels(route, scope["method"], str(status)).inc()
        client = scope.get("client")
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            "client": client[0] if client else None,
        } | scope["state"].get("log_fields", {})
        level = logging.DEBUG if route in ("/health", "/metrics") else logging.INFO
        more = " ".join(f"{name}={value}" for name, value in list(fields.items())[5:])
        text = f"{scope['method']} {scope['path']} {status} {seconds:.3f} s {more}".rstrip()
        logs.access.log(level, "%s", text, extra={"fields": fields})


class Limits:
    """Takes bodies that are too large or too slow for errors.

    Args:
        app: what answers.
        config: the server's.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._config.max_body_bytes
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or len(announced) > 18 or int(announced) > most:
            raise self._too_large()  # what comes of it all the same is thrown away by the HTTP library
        deadline = asyncio.get_running_loop().time() + self._config.read_timeout_s
        taken, complete = 0, False

        async def receive_some() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body took longer than {self._config.read_timeout_s:g} s"
                raise ApiError(408, late, headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if taken > most:
                    raise self._too_large()
            return message

        await self._app(scope, receive_some, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._config.max_body_bytes} bytes", code="body_too_large"
        )
