"""Small models behind real servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live import Live

from kuiperllm.engine.async_llm import AsyncLLM
from kuiperllm.engine.runner import Launched, Runner
from kuiperllm.server.config import ServerConfig
from tiny_models import BASE, random_weights, write_checkpoint

for package in ("fastapi", "uvicorn", "llguidance"):
    pytest.importorskip(package)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random float32 weights with a token for each byte, and a chat template."""
    config = BASE | {"max_position_embeddings": 1024}
    return write_checkpoint(tmp_path_factory.mktemp("served"), config, random_weights(config))


@pytest.fixture(scope="session")
def live(tiny_model: Path) -> Iterator[Live]:
    """One server for all tests that leave it as it was."""
    llm = AsyncLLM(tiny_model, max_num_seqs=8, max_waiting=200)
    server = Live(llm, ServerConfig(port=0, model_names=("tiny", "other-name")))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Behind each test with the common server: no sequence is left, every block is free."""
    yield
    if "live" in request.fixturenames:
        request.getfixturevalue("live").assert_idle()


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take as long as a small real model's: what is long is under way while a test looks at it."""
    wait = Runner.wait

    def wait_longer(runner: Runner, launched: Launched) -> list[int]:
        time.sleep(0.001)
        return wait(runner, launched)

    monkeypatch.setattr(Runner, "wait", wait_longer)


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Callable[..., Live]]:
    """Starts servers with settings of their own; they end with the test."""
    servers: list[Live] = []

    def start_one(llm: Any = None, engine: dict[str, Any] | None = None, **settings: Any) -> Live:
        settings = {"port": 0, "model_names": ("tiny",)} | settings
        model = llm or AsyncLLM(tiny_model, **{"max_num_seqs": 4} | (engine or {}))
        servers.append(Live(model, ServerConfig(**settings)))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def client(live: Live) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as found:
        yield found
