"""A small HTTP client for streams, which costs the machine that measures next to nothing."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kuiperllm.errors import KuiperError, UsageError


class AnswerError(KuiperError):
    """A server answered something else than 200.

    Args:
        status: what it answered; 0: nothing that is HTTP.
        message: what it said.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the server answered {status}: {message}" if status else message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Target:
    """A server.

    Raises:
        UsageError: the address is no `http://` or `https://`.
    """

    url: str
    """Its address, without `/v1`."""
    api_key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{self.url!r} is not an address such as http://127.0.0.1:8000")

    async def get(self, path: str) -> Any:
        """The JSON at a path. Raises like `stream`."""
        async with self._answer("GET", path, None) as lines:
            return json.loads(b"\n".join([line async for line in lines]))

    async def post(self, path: str, body: Any) -> Any:
        """The JSON that answers some JSON. Raises like `stream`."""
        async with self._answer("POST", path, body) as lines:
            return json.loads(b"\n".join([line async for line in lines]))

    async def stream(self, path: str, body: Any) -> AsyncGenerator[tuple[float, dict[str, Any]], None]:
        """The events of a stream, each with the time of its arrival by `time.perf_counter`.

        Raises:
            AnswerError: the server answers something else than 200, or an event holds an error.
            OSError: there is no connection, or it breaks off.
        """
        async with self._answer("POST", path, body) as lines:
            async for line in lines:
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                now, found = time.perf_counter(), json.loads(line[6:])
                if "error" in found:
                    raise AnswerError(200, str(found["error"].get("message")))
                yield now, found

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Any
    ) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
        """The lines of a successful answer's body."""
        parts = urlsplit(self.url)
        encrypted = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if encrypted else 80)
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=encrypted, limit=1 << 24)
        try:
            writer.write(self._request(method, parts.path.rstrip("/") + path, parts.netloc, body))
            status, chunked = await _head(reader)
            lines = _lines(_body(reader, chunked))
            if status != 200:
                raise AnswerError(status, _message(b"\n".join([line async for line in lines])))
            yield lines
        except asyncio.IncompleteReadError:
            raise ConnectionError("the connection broke off") from None
        finally:
            writer.close()

    def _request(self, method: str, path: str, host: str, body: Any) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {path} HTTP/1.1",
            f"Host: {host}",
            "Connection: close",
            f"Content-Length: {len(data)}",
        ]
        if body is not None:
            head.append("Content-Type: application/json")
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*head, "", ""]).encode() + data


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether the body comes in chunks."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    words = lines[0].split()
    if len(words) < 2 or not words[0].startswith("http/") or not words[1].isdigit():
        raise AnswerError(0, "what answers there is no HTTP server")
    return int(words[1]), any(
        line.startswith("transfer-encoding:") and "chunked" in line for line in lines[1:]
    )


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncGenerator[bytes, None]:
    if not chunked:
        while data := await reader.read(1 << 16):
            yield data
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _lines(parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    held = b""
    async for part in parts:
        *whole, held = (held + part).split(b"\n")
        for line in whole:
            yield line
    if held:
        yield held


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
