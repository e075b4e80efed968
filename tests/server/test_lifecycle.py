"""Keys, origins, encryption, logs, metrics; what happens at the end, and when the engine fails."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import Live

from kuiperllm.errors import EngineStoppedError, UsageError
from kuiperllm.server import logs
from kuiperllm.server.config import ServerConfig
from kuiperllm.server.run import listen

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True}


# --- who may ask ------------------------------------------------------------------------------------------


def test_api_keys(start: Callable[..., Live]) -> None:
    live = start(api_keys=("first", "second"))
    with httpx.Client(base_url=live.url) as http:
        for path in ("/v1/models", "/v1/models/tiny"):
            assert http.get(path).status_code == 401
        for path in (CHAT, TEXT, "/v1/embeddings", "/tokenize", "/detokenize", "/v1/nothing"):
            refused = http.post(path, json={})
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        for header in (
            "first",
            "Bearer",
            "Bearer wrong",
            "Bearer firstx",
            "Basic first",
            "Bearer f\u00efrst",
        ):
            given = {"Authorization": header.encode("latin-1")}
            assert http.get("/v1/models", headers=given).status_code == 401
        for key in ("first", "second"):
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/metrics", "/", "/openapi.json"):
            assert http.get(path).status_code == 200


def test_other_origins(start: Callable[..., Live]) -> None:
    origin = "https://app.example"
    live = start(allowed_origins=(origin,), api_keys=("key",))
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization, content-type"
    allowed = live.http.options(CHAT, headers=ask)  # a browser asks without a key
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-origin" in live.http.get("/v1/models", headers={"Origin": origin}).headers
    other = live.http.options(CHAT, headers=ask | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_no_other_origins_by_default(live: Live) -> None:
    answer = live.http.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


# --- encryption -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    command += [
        "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(made),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    return made, key


def test_tls(start: Callable[..., Live], certificate: tuple[Path, Path]) -> None:
    live = start(tls_certificate=certificate[0], tls_key=certificate[1])
    assert live.url.startswith("https://")
    assert live.post(TEXT, prompt="a").status_code == 200
    assert len(live.events(TEXT, prompt="a", max_tokens=3)) >= 1
    with pytest.raises(httpx.ConnectError), httpx.Client() as strict:
        strict.get(live.url)


def test_a_certificate_that_is_none(
    start: Callable[..., Live], certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    with pytest.raises(UsageError, match="TLS"):
        start(tls_certificate=wrong, tls_key=certificate[1])


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 70_000},
        {"max_waiting": 0},
        {"read_timeout_s": 0},
        {"read_timeout_s": float("nan")},
        {"tool_format": "xml"},
        {"log_format": "yaml"},
        {"api_keys": ("a b",)},
        {"api_keys": ("",)},
        {"model_names": ("",)},
        {"tls_key": Path("nowhere")},
        {"tls_key": Path("nowhere"), "tls_certificate": Path("nowhere")},
    ],
    ids=str,
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        ServerConfig(**settings)
    assert "\n" not in str(caught.value)


def test_addresses_that_cannot_be_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="port"):
        listen(ServerConfig(port=taken.getsockname()[1]))
    with pytest.raises(UsageError, match="--host"):
        listen(ServerConfig(host="203.0.113.7", port=0))
    with pytest.raises(UsageError, match="--host"):
        listen(ServerConfig(host="no-such-host.invalid", port=0))
    with pytest.raises(UsageError, match="--host"):
        listen(ServerConfig(host="x" * 300, port=0))


# --- ids and logs -----------------------------------------------------------------------------------------


def test_request_ids(live: Live) -> None:
    made = live.http.get("/health").headers["x-request-id"]
    assert made != live.http.get("/health").headers["x-request-id"]
    assert live.http.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for strange in ("a b", "x" * 100, "a\tb", "é"):
        given = {"X-Request-Id": strange.encode("latin-1")}
        assert live.http.get("/health", headers=given).headers["x-request-id"] != strange


def test_two_requests_of_one_id(live: Live) -> None:
    """The id is the client's affair: it need not be unique."""
    answers: list[int] = []

    def ask() -> None:
        headers = {"X-Request-Id": "same"}
        answers.append(live.http.post(TEXT, json=LONG | {"max_tokens": 60}, headers=headers).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 4


def test_the_log_has_a_line_for_each_answer(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kuiperllm.server.access"):
        live.http.post(TEXT, json={"prompt": "ab"}, headers={"X-Request-Id": "find-me"})
        live.wait_until(lambda: bool(caplog.records))
    (record,) = [r for r in caplog.records if r.name == "kuiperllm.server.access"]
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["status"] == 200
    assert fields["path"] == TEXT
    assert fields["prompt_tokens"] == 3
    assert fields["seconds"] > 0


def test_lines_of_the_log() -> None:
    record = logging.LogRecord("kuiperllm.server.x", logging.INFO, "f", 1, "said %s", ("a\nb\x1b[31m",), None)
    record.fields = {"status": 200}
    token = logs.request_id.set("r-1")
    try:
        text, line = logs.TextLines().format(record), logs.JsonLines().format(record)
    finally:
        logs.request_id.reset(token)
    assert text.endswith("INFO server.x [r-1]: said a?b?[31m")
    entry = json.loads(line)
    assert "\n" not in line
    assert entry["request_id"] == "r-1"
    assert entry["status"] == 200
    assert entry["level"] == "info"
    assert entry["message"] == "said a\nb\x1b[31m"


# --- metrics ----------------------------------------------------------------------------------------------

READ_BY_DASHBOARDS = """
    num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc prompt_tokens_total
    generation_tokens_total num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total
    request_success_total time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
    time_per_output_token_seconds_bucket request_time_per_output_token_seconds_bucket
    e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket request_inference_time_seconds_bucket
    request_prefill_time_seconds_bucket request_decode_time_seconds_bucket request_prompt_tokens_bucket
    request_generation_tokens_bucket request_params_max_tokens_bucket request_params_n_bucket
    cache_config_info
""".split()  # noqa: SIM905


def test_metrics(start: Callable[..., Live]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    live = start()
    assert live.post(TEXT, prompt="abc", max_tokens=7, ignore_eos=True).status_code == 200
    assert len(live.events(TEXT, prompt="abc", max_tokens=7, ignore_eos=True, n=2)) >= 2
    assert live.post(TEXT, prompt=5).status_code == 400
    text = live.http.get("/metrics").text
    list(text_string_to_metric_families(text))  # well-formed
    for name in READ_BY_DASHBOARDS:
        assert f"vllm:{name}{{" in text, name
    assert live.metric("vllm:generation_tokens_total") == 21
    assert live.metric("vllm:e2e_request_latency_seconds_count") == 3
    assert live.metric("vllm:request_generation_tokens_sum") == 21
    assert live.metric("vllm:inter_token_latency_seconds_count") == 18
    assert live.metric("vllm:request_params_n_sum") == 3
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 3.0' in text
    assert 'kuiper:http_requests_total{method="POST",route="/v1/completions",status="400"} 1.0' in text
    assert live.metric("kuiper:http_requests_in_flight") == 1  # this one


# --- the end ----------------------------------------------------------------------------------------------


def test_requests_under_way_end_before_the_server_does(start: Callable[..., Live]) -> None:
    live = start(drain_timeout_s=30)
    done: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: done.extend(live.events(TEXT, **LONG | {"max_tokens": 300})))
    asking.start()
    live.wait_until(lambda: live.llm.stats().num_running > 0)
    live.ask_to_stop()
    asking.join()
    assert done[-1]["choices"][0]["finish_reason"] == "length"
    live.stop()
    assert not live.llm.is_running
    with pytest.raises(httpx.ConnectError), httpx.Client() as http:
        http.get(live.url)


def test_what_does_not_end_in_time_is_given_up(start: Callable[..., Live]) -> None:
    live = start(drain_timeout_s=0)
    with live.connection() as raw:
        live.raw_post(raw, TEXT, **LONG | {"n": 100}, stream=True)
        live.wait_until(lambda: live.llm.stats().num_running > 0)
        started = time.monotonic()
        live.stop()
        assert time.monotonic() - started < 10
    assert live.llm.stats().kv_blocks_used == 0


def test_a_failed_engine_ends_the_server(start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    live = start()

    def fail() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(live.llm._engine, "step", fail)
    answer = live.post(TEXT, prompt="a")
    assert answer.status_code in (500, 503)
    assert "device is gone" in answer.json()["error"]["message"]
    live.wait_for_end()
    assert isinstance(live.failure, EngineStoppedError)


def test_a_stream_says_that_the_engine_failed(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start()
    real = live.llm._engine.step
    steps = iter(range(5))

    def fail() -> Any:
        if next(steps, None) is None:
            raise RuntimeError("the device is gone")
        return real()

    monkeypatch.setattr(live.llm._engine, "step", fail)
    events = live.events(TEXT, **LONG)
    assert "device is gone" in events[-1]["error"]["message"]
    live.wait_for_end()


def test_an_error_that_nobody_foresaw(start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    live = start()

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(live.llm, "generate", fail)
    answer = live.post(TEXT, prompt="a")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    monkeypatch.undo()
    assert live.post(TEXT, prompt="a").status_code == 200


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_serves_and_stops_at_a_signal(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "kuiperllm", "serve", "-m", str(tiny_model), "--port", "0"]
    command += ["--served-name", "x", "--log-format", "json"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"KUIPER_API_KEY": "k"}
    ) as run:
        assert run.stderr is not None
        try:
            line = ""
            while "serving at " not in line:
                line = run.stderr.readline()
                assert line, "ended"
            address = json.loads(line)["message"].split()[2]
            with httpx.Client(base_url=address, headers={"Authorization": "Bearer k"}) as http:
                assert http.get("/v1/models").json()["data"][0]["id"] == "x"
            run.send_signal(signal.SIGTERM)
            rest = run.stderr.read()
            assert run.wait(20) == 0
        finally:
            run.kill()
    entries = [json.loads(line) for line in rest.splitlines()]
    assert any(entry.get("path") == "/v1/models" and entry["status"] == 200 for entry in entries)


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "99999"],
        ["--api-key", "a b"],
        ["--tool-format", "x"],
        ["--tls-key", "nowhere"],
        ["--chat-template", "nowhere"],
        ["--max-num-seqs", "0"],
        ["--host", "203.0.113.7"],
    ],
    ids=" ".join,
)
def test_the_command_refuses(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from kuiperllm.cli import main

    assert main(["serve", *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
