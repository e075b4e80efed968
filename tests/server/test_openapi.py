"""The API's description is true: requests made from it are answered as it says, and never with a 5xx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from live import Live

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]

BEYOND_SCHEMAS = {"invalid_value", "context_length_exceeded", "chat_template_error"}
"""Codes of mistakes that a JSON schema cannot state: contradictions, a regex that is none, long prompts."""

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_every_operation_is_described(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    found = [(method.upper(), path) for path, one in document["paths"].items() for method in one]
    assert sorted(found) == sorted(OPERATIONS)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            assert "422" not in operation["responses"], path


def test_keys_are_described(start: Callable[..., Live]) -> None:
    live = start(api_keys=("k",))
    paths = httpx.get(f"{live.url}/openapi.json").json()["paths"]
    assert paths["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "401" in paths["/v1/completions"]["post"]["responses"]
    assert "security" not in paths["/health"]["get"]


@pytest.fixture(scope="module")
def described(tiny_model: Any) -> Any:
    """A server of few tokens and outputs, so that nothing takes long, and its description."""
    from kuiperllm.engine.async_llm import AsyncLLM
    from kuiperllm.server.config import ServerConfig

    config = ServerConfig(port=0, model_names=("tiny",), max_outputs=4, tool_format="hermes")
    server = Live(AsyncLLM(tiny_model, max_model_len=48, max_num_seqs=8), config)
    yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    server.assert_idle()
    server.stop()


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_described(described: Any, method: str, path: str, mode: str) -> None:
    """Requests as the description has them, and others that it does not have."""
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    operation = described[path][method]
    if mode == "negative" and method == "GET":
        pytest.skip("there is nothing to do wrong")

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def check(case: Any) -> None:
        response = case.call()
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        assert response.status_code < 500
        if mode == "positive" and response.status_code == 400:
            assert response.json()["error"]["code"] in BEYOND_SCHEMAS, response.text

    check()
