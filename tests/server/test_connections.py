"""Clients that are slow, vanish, or send too much: they cost nothing for long, and others are answered."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import Live

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
pytestmark = pytest.mark.usefixtures("slow_steps")

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True}


def read_all(raw: socket.socket, seconds: float = 15) -> bytes:
    raw.settimeout(seconds)
    data = b""
    try:
        while part := raw.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def wait_for_work(live: Live) -> None:
    live.wait_until(lambda: live.llm.stats().num_running > 0)


# --- clients that go away ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_vanishes_frees_its_request_at_once(live: Live, stream: bool, reset: bool) -> None:
    made = live.llm.stats().generated_tokens
    with live.connection() as raw:
        live.raw_post(raw, TEXT, **LONG, stream=stream, n=4)
        wait_for_work(live)
        if reset:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    live.assert_idle()
    assert live.llm.stats().generated_tokens - made < 3900  # of 4,000


def test_vanishing_in_prefill_and_in_the_queue(start: Callable[..., Live]) -> None:
    live = start(engine={"max_num_seqs": 1, "max_num_batched_tokens": 16, "prefix_caching": False})
    with ExitStack() as stack:
        for _ in range(6):
            raw = stack.enter_context(live.connection())
            live.raw_post(raw, TEXT, prompt=[97] * 1000, max_tokens=20)
        live.wait_until(lambda: live.llm.stats().num_running + live.llm.stats().num_waiting >= 5)
    live.assert_idle()


def test_a_client_that_vanishes_with_many_prompts(live: Live) -> None:
    with live.connection() as raw:
        live.raw_post(raw, TEXT, **LONG | {"prompt": ["a", "b", "c", "d"]}, n=3, stream=True)
        wait_for_work(live)
    live.assert_idle()


def test_a_client_that_vanishes_in_the_middle_of_its_body(live: Live) -> None:
    with live.connection() as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        raw.sendall(b'Content-Length: 100\r\n\r\n{"prompt"')
        time.sleep(0.05)
    with live.connection() as raw:
        raw.sendall(b"POST /v1/comple")
    assert live.http.get("/health").status_code == 200


def test_disconnects_are_counted(live: Live) -> None:
    before = live.metric("kuiper:http_requests_total")
    with live.connection() as raw:
        live.raw_post(raw, TEXT, **LONG, stream=True)
        wait_for_work(live)
    live.assert_idle()
    live.wait_until(lambda: 'status="499"' in live.http.get("/metrics").text)
    assert live.metric("kuiper:http_requests_total") > before


# --- bodies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_100_megabytes(live: Live, chunked: bool) -> None:
    """With its length said beforehand it is not even read; else it is not kept."""
    blocks = (b" " * (1 << 20) for _ in range(100))
    content: Any = blocks if chunked else b"".join(blocks)
    before = resident()
    response = live.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    if not chunked:
        del content
    assert resident() - before < 150 << 20


def resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_length_that_is_no_number(live: Live) -> None:
    for length in ("99999999999999999999999", "-5", "1e3", "\u00b2"):
        with live.connection() as raw:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
            raw.sendall(head.encode("latin-1", "replace"))
            assert read_all(raw).split(b" ", 2)[1] in (b"400", b"413")


def test_the_body_limit_can_be_set(start: Callable[..., Live]) -> None:
    live = start(max_body_bytes=1000)
    assert live.post(TEXT, prompt="a" * 400, max_tokens=1).status_code == 200
    assert live.post(TEXT, prompt="a" * 1000, max_tokens=1).status_code == 413
    assert live.post(TEXT, prompt="a" * 400, max_tokens=1).status_code == 200


# --- slow clients -----------------------------------------------------------------------------------------


@pytest.fixture
def impatient(start: Callable[..., Live]) -> Live:
    return start(read_timeout_s=0.4, write_timeout_s=0.6, heartbeat_s=0.1)


@pytest.mark.parametrize(
    "beginning",
    [b"", b"POST ", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "],
)
def test_slow_heads(impatient: Live, beginning: bytes) -> None:
    with impatient.connection() as raw:
        raw.sendall(beginning)
        started = time.monotonic()
        assert read_all(raw) == b""
        assert time.monotonic() - started < 5


def test_a_head_by_drops_does_not_buy_time(impatient: Live) -> None:
    with impatient.connection() as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\n")
        until = time.monotonic() + 5

        def drip() -> None:
            while time.monotonic() < until:
                raw.sendall(b"X-A: b\r\n")
                time.sleep(0.05)

        with pytest.raises(OSError, match=r"."):
            drip()


def test_a_second_head_may_not_be_slow_either(impatient: Live) -> None:
    with impatient.connection() as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        raw.sendall(b"GET /hea")
        answer = read_all(raw)
    assert answer.count(b"HTTP/1.1 200") == 1


def test_slow_bodies(impatient: Live) -> None:
    with impatient.connection() as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        raw.sendall(b'Content-Length: 100\r\n\r\n{"prompt"')
        answer = read_all(raw)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"message":"the body took longer' in answer


def test_heads_that_are_too_long(live: Live) -> None:
    with live.connection() as raw:
        answer = b""
        try:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            for index in range(3000):
                raw.sendall(b"X-%d: %s\r\n" % (index, b"y" * 100))
            answer = read_all(raw, 5)
        except OSError:
            pass
    assert not answer.startswith(b"HTTP/1.1 200")
    assert live.http.get("/health").status_code == 200


def test_a_client_that_takes_nothing_is_given_up(impatient: Live) -> None:
    """A long stream to a client that does not read: buffers fill, then the connection is cut."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", int(impatient.url.rpartition(":")[2])))
        body = LONG | {"prompt": ["a"] * 16, "n": 4, "stream": True, "logprobs": 20, "max_tokens": 400}
        impatient.raw_post(raw, TEXT, **body)
        impatient.wait_until(lambda: 'status="499"' in impatient.http.get("/metrics").text, 40)
        impatient.assert_idle()


def test_streams_that_wait_say_so(start: Callable[..., Live]) -> None:
    live = start(engine={"max_num_seqs": 1}, heartbeat_s=0.02)
    with live.connection() as first, live.connection() as second:
        live.raw_post(first, TEXT, **LONG)
        wait_for_work(live)
        live.raw_post(second, TEXT, **LONG | {"max_tokens": 2}, stream=True)
        data = b""
        second.settimeout(20)
        while b"[DONE]" not in data:
            data += second.recv(65536)
    assert b": waiting\n\n" in data
    assert data.index(b": waiting") < data.index(b"data:")


# --- many ---------------------------------------------------------------------------------------------------


def test_too_many_connections(start: Callable[..., Live]) -> None:
    live = start(max_connections=5)
    with ExitStack() as stack:
        open_ones = [stack.enter_context(live.connection()) for _ in range(5)]
        time.sleep(0.1)
        with live.connection() as raw:
            answer = read_all(raw)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: " in answer
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert body["error"]["code"] == "too_many_connections"
        open_ones[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(open_ones[0]).startswith(b"HTTP/1.1 200")
    live.wait_until(lambda: live.http.get("/health").status_code == 200)


def test_the_queue_has_an_end(start: Callable[..., Live]) -> None:
    live = start(engine={"max_num_seqs": 1, "max_waiting": 3})
    with ExitStack() as stack:
        first = stack.enter_context(live.connection())
        live.raw_post(first, TEXT, **LONG)
        wait_for_work(live)
        for _ in range(3):
            live.raw_post(stack.enter_context(live.connection()), TEXT, **LONG)
        live.wait_until(lambda: live.llm.stats().num_waiting >= 3)
        for stream in (False, True):
            refused = live.post(TEXT, prompt="a", stream=stream)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "queue_full"
        assert live.http.get("/health").status_code == 200
    live.assert_idle()
    assert live.post(TEXT, prompt="a").status_code == 200


def test_thousands_of_requests_at_once(start: Callable[..., Live]) -> None:
    """More than there is room for: each is answered, with 200 or 503, and nothing is left."""
    live = start(engine={"max_num_seqs": 8, "max_waiting": 50})
    found: list[int] = []

    def ask(count: int) -> None:
        with httpx.Client(base_url=live.url, timeout=60) as http:
            for _ in range(count):
                found.append(http.post(TEXT, json={"prompt": ["a"] * 20, "max_tokens": 2}).status_code)

    threads = [threading.Thread(target=ask, args=(5,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100
    assert set(found) == {200, 503}
    live.assert_idle()
