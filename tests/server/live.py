"""A server in a thread of its own, with a real socket, for tests."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from kuiperllm.engine.async_llm import AsyncLLM
from kuiperllm.server.config import ServerConfig
from kuiperllm.server.run import Serving


class Live:
    """A running server.

    Attributes:
        llm: the model that it serves.
        url: its address.
        http: a client for it.
        failure: what ended it, if not `stop`.
    """

    def __init__(self, llm: Any, config: ServerConfig) -> None:
        self.llm: AsyncLLM = llm
        self.config = config
        self.url = ""
        self.failure: BaseException | None = None
        self._ready = threading.Event()
        self._serving = Serving(llm, config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if not self._ready.wait(60):
            raise AssertionError("the server did not start")
        if self.failure is not None:
            raise self.failure
        verify = config.tls_key is None
        headers = {"Authorization": f"Bearer {config.api_keys[0]}"} if config.api_keys else {}
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=verify, headers=headers)

    def _run(self) -> None:
        try:
            asyncio.run(self._serving.run(self._set_url))
        except BaseException as error:
            self.failure = error
        finally:
            self._ready.set()

    def _set_url(self, address: str) -> None:
        self.url = address
        self._ready.set()

    def ask_to_stop(self) -> None:
        self._serving.stop()

    def stop(self) -> None:
        self._serving.stop()
        self.wait_for_end()

    def wait_for_end(self) -> None:
        self.http.close()
        self._thread.join(60)
        assert not self._thread.is_alive()

    # --- requests -----------------------------------------------------------------------------------------

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, without the last, which is checked."""
        with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        place = urlsplit(self.url)
        with socket.create_connection((place.hostname or "", place.port or 0), timeout=30) as raw:
            yield raw

    def raw_post(self, raw: socket.socket, path: str, **body: Any) -> None:
        """Send a request by hand."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        raw.sendall(head.encode() + data)

    # --- how it is ----------------------------------------------------------------------------------------

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        found = [
            float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].split(" ")[0] == name
        ]
        assert found, name
        return sum(found)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.llm.stats()
            time.sleep(0.005)

    def is_idle(self) -> bool:
        stats = self.llm.stats()
        return stats.num_running == stats.num_waiting == stats.kv_blocks_used == 0

    def assert_idle(self) -> None:
        """Nothing is under way, and every block is free."""
        self.wait_until(self.is_idle)
