"""What several endpoints do in the same way."""

from __future__ import annotations

import time
import uuid
from typing import Any, cast

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from kuiperllm.engine.output import Completion
from kuiperllm.server.errors import bad_request
from kuiperllm.server.protocol.chat import JsonObjectFormat, JsonSchemaFormat, ResponseFormat
from kuiperllm.server.protocol.common import SamplingFields, StructuredOutputs
from kuiperllm.server.protocol.completions import Prompts
from kuiperllm.server.state import ServerState
from kuiperllm.server.structured import Grammar, any_of, json_object, json_schema, lark, regex


def json_response(value: Any) -> Response:
    """An answer of plain values."""
    return Response(to_json(value), media_type="application/json")


def state_of(request: Request) -> ServerState:
    """What the application shares."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state


def new_id(kind: str) -> str:
    """A name for an answer, such as `chatcmpl-...`."""
    return f"{kind}-{uuid.uuid4().hex}"


def request_id(request: Request) -> str:
    """The id that the log knows a request by."""
    return str(request.scope["state"]["request_id"])


def log_fields(request: Request, **fields: object) -> None:
    """Let the log's line about a request say more."""
    request.scope["state"].setdefault("log_fields", {}).update(fields)


def head(state: ServerState, kind: str, object_name: str) -> dict[str, Any]:
    """The fields with which answers of one request begin."""
    return {
        "id": new_id(kind),
        "object": object_name,
        "created": int(time.time()),
        "model": state.model_name,
        "system_fingerprint": state.fingerprint,
    }


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int | None = None) -> dict[str, Any]:
    """Tokens taken in and made."""
    made: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if reasoning is not None:
        made["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return made


def usage_of(completions: list[list[Completion]], reasoning: int | None = None) -> dict[str, Any]:
    """The usage of a whole request: each prompt counts once."""
    return usage(
        sum(len(outputs[0].prompt_token_ids) for outputs in completions),
        sum(len(completion.token_ids) for outputs in completions for completion in outputs),
        sum(outputs[0].num_cached_tokens for outputs in completions),
        reasoning,
    )


def as_prompts(given: Prompts) -> list[str | list[int]]:
    """The prompts of a request, which may hold one or a list of them."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]
    return list(cast("list[str | list[int]]", given))


def check_stream_options(body: SamplingFields) -> None:
    """Refuse options of a stream without a stream.

    Raises:
        ApiError: there are some.
    """
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options goes with stream=true only", "stream_options")


def asked_grammar(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Grammar | None:
    """The form that a request wants its output to have; None: any.

    Raises:
        ApiError: two forms are asked for.
        UsageError: it is too large.
    """
    forms = []
    if isinstance(response_format, JsonObjectFormat):
        forms.append(json_object())
    elif isinstance(response_format, JsonSchemaFormat):
        forms.append(json_schema(response_format.json_schema.schema_))
    if structured is not None:
        if structured.json_schema is not None:
            forms.append(json_schema(structured.json_schema))
        if structured.regex is not None:
            forms.append(regex(structured.regex))
        if structured.choice is not None:
            forms.append(any_of(structured.choice))
        if structured.grammar is not None:
            forms.append(lark(structured.grammar))
        if not forms:
            raise bad_request(
                "structured_outputs: say one of json, regex, choice, grammar", "structured_outputs"
            )
    if len(forms) > 1:
        raise bad_request(
            "an output can have one form only: response_format, or one field of structured_outputs",
            "structured_outputs",
        )
    return forms[0] if forms else None
