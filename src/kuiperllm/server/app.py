"""The application: endpoints, pages, middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from kuiperllm.server.config import ServerConfig
from kuiperllm.server.errors import add_handlers
from kuiperllm.server.middleware import Gate, Limits
from kuiperllm.server.openapi import describe
from kuiperllm.server.pages import add_pages
from kuiperllm.server.protocol.chat import ChatChunk, ChatRequest
from kuiperllm.server.protocol.completions import CompletionRequest
from kuiperllm.server.protocol.other import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from kuiperllm.server.routes import chat, completions, other
from kuiperllm.server.state import ServerState

if TYPE_CHECKING:
    from kuiperllm.engine.async_llm import AsyncLLM

_UNKNOWN_TO_FASTAPI = (
    ChatRequest,
    ChatChunk,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def create_app(llm: AsyncLLM, config: ServerConfig | None = None) -> FastAPI:
    """The application in front of a model; an ASGI app for any server.

    It does not shut the model down, and its limits for slow connections are in `run`, not here.

    Args:
        llm: the model.
        config: how to behave.

    Raises:
        ChatTemplateError: the configured chat template is not valid.
    """
    config = config or ServerConfig()
    state = ServerState(llm, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await state.grammars.prepare()
        try:
            yield
        finally:
            state.close()

    app = FastAPI(
        title="KuiperLLM",
        description="OpenAI's API in front of one model.",
        version=version("kuiperllm"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = state
    for module in (chat, completions, other):
        app.include_router(module.router)
    add_handlers(app)
    if config.page:
        add_pages(app)
    # The last one added is the first that a request meets.
    app.add_middleware(Limits, config=config)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(Gate, config=config, metrics=state.metrics)
    document: dict[str, Any] = {}
    sizes = {"vocab_size": llm.tokenizer.vocab_size, "hidden_size": llm.config.hidden_size}

    def description() -> dict[str, Any]:
        if not document:
            document.update(describe(app, _UNKNOWN_TO_FASTAPI, sizes, needs_key=bool(config.api_keys)))
        return document

    app.openapi = description  # type: ignore[method-assign]
    return app
