"""Serves an application: sockets, signals, draining."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from kuiperllm.errors import EngineStoppedError, KuiperError, UsageError
from kuiperllm.server.app import create_app
from kuiperllm.server.config import ServerConfig
from kuiperllm.server.connections import bounded_protocol

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kuiperllm.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

_LOOK_S = 0.5  # how often to look whether the engine is well
_IDLE_S = (
    75  # a connection without a request stays open for so long: a little longer than proxies keep theirs
)


def serve(
    llm: AsyncLLM,
    config: ServerConfig,
    ready: Callable[[str], None] | None = None,
    listener: socket.socket | None = None,
) -> None:
    """Answer requests until a signal comes (SIGINT, SIGTERM) or the engine fails; then shut the model down.

    After a signal no new connections are taken; requests under way have `drain_timeout_s` to end, and another
    signal ends them at once.

    Args:
        llm: the model.
        config: how to behave.
        ready: called with the address once requests are taken.
        listener: what `listen` gave, if it was called before the model was loaded.

    Raises:
        UsageError: the address cannot be used, or the certificate not be read.
        EngineStoppedError: the engine failed.
    """
    try:
        serving = Serving(llm, config, listener)
    except BaseException:
        asyncio.run(llm.shutdown())
        raise
    asyncio.run(serving.run(ready))


class Serving:
    """A model behind a socket.

    Args:
        llm: the model; it is shut down in the end.
        config: how to behave.
        listener: see `serve`.

    Raises:
        UsageError: the address cannot be used, or the certificate not be read.
        ChatTemplateError: the configured chat template is not valid.
    """

    def __init__(self, llm: AsyncLLM, config: ServerConfig, listener: socket.socket | None = None) -> None:
        self._llm = llm
        self._config = config
        self._server = _Server(_uvicorn_config(create_app(llm, config), config), llm)
        self._listener = listener or listen(config)

    @property
    def address(self) -> str:
        """Where a browser finds the server."""
        host, port = self._listener.getsockname()[:2]
        if host in ("0.0.0.0", "::"):
            host = "localhost"
        kind = "http" if self._config.tls_key is None else "https"
        return f"{kind}://{f'[{host}]' if ':' in host else host}:{port}"

    async def run(self, ready: Callable[[str], None] | None = None) -> None:
        """Answer requests until `stop` is called, or a signal comes; otherwise as `serve`."""
        self._server.on_ready = lambda: ready and ready(self.address)
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            self._listener.close()
            await self._llm.shutdown()
        if self._llm.failure is not None:
            raise EngineStoppedError(f"the engine failed: {self._llm.failure}")

    def stop(self) -> None:
        """Take no more requests, and end with those under way; may be called from any thread."""
        self._server.should_exit = True


def listen(config: ServerConfig) -> socket.socket:
    """A socket that connections come in by.

    Raises:
        UsageError: the address is not one of this machine, or taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen at {config.host}, port {config.port}: {reason}; choose another --host or --port"
        ) from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it is ready, looks after the engine, and keeps signals to itself."""

    def __init__(self, config: uvicorn.Config, llm: AsyncLLM) -> None:
        super().__init__(config)
        self._llm = llm
        self.on_ready: Callable[[], object] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self.on_ready()

    async def main_loop(self) -> None:
        watching = asyncio.ensure_future(self._watch())
        try:
            await super().main_loop()
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        while self._llm.failure is None:
            await asyncio.sleep(_LOOK_S)
        log.error("the engine failed: %s", self._llm.failure)
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not kept in `_captured_signals`, from which uvicorn would raise them again: the end is in order.
        if self.should_exit:
            self.force_exit = True
        else:
            log.info("stopping: requests under way may end")
        self.should_exit = True


def _uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    made = uvicorn.Config(
        app,
        http=bounded_protocol(config),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=math.ceil(config.drain_timeout_s),
        backlog=2048,
        ssl_certfile=None if config.tls_certificate is None else str(config.tls_certificate),
        ssl_keyfile=None if config.tls_key is None else str(config.tls_key),
    )
    try:
        made.load()
    except KuiperError:
        raise
    except OSError as error:  # also what the ssl module raises
        raise UsageError(f"the TLS certificate and its key cannot be used: {error}") from None
    return made
