"""Models, embeddings, tokens, health, metrics."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from kuiperllm.engine.output import Completion
from kuiperllm.server.errors import ApiError, bad_request, unavailable
from kuiperllm.server.metrics import CONTENT_TYPE
from kuiperllm.server.openapi import documented
from kuiperllm.server.protocol.other import (
    DetokenizeAnswer,
    DetokenizeRequest,
    EmbeddingAnswer,
    EmbeddingRequest,
    Health,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
)
from kuiperllm.server.routes.common import as_prompts, json_response, log_fields, request_id, state_of
from kuiperllm.server.state import ServerState
from kuiperllm.server.streaming import unless_client_leaves

router = APIRouter()


# --- models -----------------------------------------------------------------------------------------------


@router.get("/v1/models", tags=["OpenAI"], **documented(ModelList, errors=(401,)))
async def list_models(request: Request) -> Response:
    """The models that are served: one, under each of its names."""
    state = state_of(request)
    return json_response({"object": "list", "data": [_card(state, name) for name in state.model_names]})


@router.get("/v1/models/{model:path}", tags=["OpenAI"], **documented(ModelCard, errors=(401, 404)))
async def retrieve_model(request: Request, model: str) -> Response:
    """One of the models that are served."""
    state = state_of(request)
    if model not in state.model_names:
        raise ApiError(404, f"there is no model {model!r} here", param="model", code="model_not_found")
    return json_response(_card(state, model))


def _card(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "kuiperllm",
        "root": state.llm.loaded.name,
        "parent": None,
        "max_model_len": state.llm.max_model_len,
        "chat": state.prompts.template is not None,
    }


# --- embeddings -------------------------------------------------------------------------------------------


@router.post("/v1/embeddings", tags=["OpenAI"], **documented(EmbeddingAnswer, body=EmbeddingRequest))
async def create_embeddings(request: Request) -> Response:
    """Turn texts into vectors: the model's last hidden state at the last token, of length 1."""
    state = state_of(request)
    body = await state.read(request, EmbeddingRequest)
    size = state.llm.config.hidden_size
    if body.dimensions not in (None, size):
        raise bad_request(
            f"dimensions={body.dimensions} is not possible; the model's vectors have {size}", "dimensions"
        )
    texts = as_prompts(body.input)
    if len(texts) > state.config.max_prompts:
        raise bad_request(
            f"{len(texts)} texts are too many; {state.config.max_prompts} are possible", "input"
        )
    prompts = await unless_client_leaves(request, state.encode(texts))
    found = await unless_client_leaves(request, _embed_all(state, prompts, request_id(request)))
    total = sum(map(len, prompts))
    log_fields(request, prompts=len(prompts), prompt_tokens=total)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(completion, body.encoding_format)}
        for index, completion in enumerate(found)
    ]
    used = {"prompt_tokens": total, "total_tokens": total}
    return json_response({"object": "list", "model": state.model_name, "data": data, "usage": used})


async def _embed_all(state: ServerState, prompts: list[list[int]], name: str) -> list[Completion]:
    """All at once; if one fails, the others are given up."""
    tasks = [
        asyncio.ensure_future(state.llm.embed(prompt, request_id=f"{name}-{index}-{id(prompts):x}"))
        for index, prompt in enumerate(prompts)
    ]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _vector(completion: Completion, encoding: str | None) -> list[float] | str:
    found = completion.embedding
    assert found is not None
    vector: NDArray[np.float32] = (found / max(float(np.linalg.norm(found)), 1e-12)).astype("<f4")
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()


# --- tokens -----------------------------------------------------------------------------------------------


@router.post("/tokenize", tags=["Tokens"], **documented(TokenizeAnswer, body=TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Cut a text, or a conversation, into tokens."""
    state = state_of(request)
    body = await state.read(request, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages")
    ids = await unless_client_leaves(request, state.in_thread(_tokens, state, body))
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": state.llm.max_model_len, "tokens": ids}
    if body.return_token_strs:
        text_of = state.llm.tokenizer.token_bytes
        answer["token_strs"] = [text_of(token_id).decode("utf-8", "replace") for token_id in ids]
    return json_response(answer)


def _tokens(state: ServerState, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return state.llm.tokenizer.encode(
            body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    prompt = state.prompts.make(
        body.messages or [],
        body.tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )
    return prompt.ids


@router.post("/detokenize", tags=["Tokens"], **documented(DetokenizeAnswer, body=DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """Turn tokens into text."""
    state = state_of(request)
    body = await state.read(request, DetokenizeRequest)
    text = await state.in_thread(state.llm.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response({"prompt": text})


# --- how the server is ------------------------------------------------------------------------------------


@router.get("/health", tags=["Server"], **documented(Health, errors=(503,)))
async def health(request: Request) -> Response:
    """Whether requests are taken; for load balancers."""
    llm = state_of(request).llm
    if llm.failure is not None:
        raise unavailable(f"the engine failed: {llm.failure}", "engine_failed")
    if not llm.is_running:
        raise unavailable("the server is stopping", "stopping")
    return json_response({"status": "ok"})


@router.get(
    "/metrics",
    tags=["Server"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE)
