"""The description of the API, made so that it is true: what is read, what is answered, with which status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from kuiperllm.server.protocol.common import ErrorAnswer

_REF = "#/components/schemas/{model}"

ERRORS = {
    400: "Something is wrong with the request.",
    401: "There is no API key, or not a valid one.",
    404: "There is no such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "Something is wrong with the server.",
    503: "Too many wait already, or the engine does not run; see `Retry-After`.",
}

_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


def documented(
    answer: type[BaseModel],
    *,
    body: type[BaseModel] | None = None,
    event: type[BaseModel] | None = None,
    errors: tuple[int, ...] = tuple(ERRORS),
) -> dict[str, Any]:
    """Arguments of a route's decorator that describe it.

    Args:
        answer: the body of a success.
        body: what is read.
        event: what an event of a stream holds, if there can be one.
        errors: possible statuses other than 200.
    """
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "Done."}}
    if event is not None:
        text = f"With `stream`: events whose data is a {event.__name__} each, and at last `[DONE]`."
        schema = {"type": "string", "description": text}
        responses[200]["content"] = {"text/event-stream": {"schema": schema}}
    for status in errors:
        responses[status] = {"model": ErrorAnswer, "description": ERRORS[status]}
        if status == 503:
            responses[status]["headers"] = _RETRY
    found: dict[str, Any] = {"responses": responses, "response_model": answer}
    if body is not None:
        content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}
        found["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return found


def describe(
    app: FastAPI, models: Sequence[type[BaseModel]], sizes: Mapping[str, int], *, needs_key: bool
) -> dict[str, Any]:
    """The whole description: OpenAPI 3.1.

    Args:
        app: has the routes.
        models: those of bodies and events, which FastAPI does not know of.
        sizes: numbers of this model, by the names under which models of bodies refer to them.
        needs_key: whether requests need an API key.
    """
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    components = document.setdefault("components", {})
    components["schemas"] = components.get("schemas", {}) | schemas["$defs"]
    _fill_in(components["schemas"], sizes)
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if path.startswith(("/v1/", "/tokenize", "/detokenize")):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's, for parameters; all of ours are text
            if not needs_key:
                operation["responses"].pop("401", None)
    return document


def _fill_in(node: Any, sizes: Mapping[str, int]) -> None:
    """State bounds that the model sets: `x-below` becomes `exclusiveMaximum`, `x-only` becomes `enum`."""
    if isinstance(node, list):
        for item in node:
            _fill_in(item, sizes)
    if not isinstance(node, dict):
        return
    if (name := node.pop("x-below", None)) is not None:
        node["exclusiveMaximum"] = sizes[name]
    if (name := node.pop("x-only", None)) is not None:
        node["anyOf"] = [{"type": "integer", "enum": [sizes[name]]}, {"type": "null"}]
    for value in node.values():
        _fill_in(value, sizes)
