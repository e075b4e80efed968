"""What goes wrong, as clients of OpenAI's API expect it: an HTTP status and an object `error`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kuiperllm.errors import (
    ChatTemplateError,
    ContextLengthError,
    EngineStoppedError,
    KuiperError,
    OutOfMemoryError,
    QueueFullError,
    TokenizerError,
    UsageError,
)

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic_core import ErrorDetails

log = logging.getLogger(__name__)

RETRY_AFTER_S = 2
"""When to try again after a 503: about the time in which places in the queue become free."""

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: the HTTP status.
        message: one line for the caller.
        param: the field that is to blame, such as `messages.0.role`.
        code: a word for programs, such as `context_length_exceeded`.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The object that goes over the wire."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The whole response."""
        return Response(to_json(self.body()), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A mistake of the caller that the OpenAPI description does not say is one."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """What to tell a client of an exception; what nobody foresaw is logged and becomes a 500."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return bad_request(str(error), code="context_length_exceeded")
        case QueueFullError():
            return unavailable(str(error), "queue_full")
        case EngineStoppedError():
            return unavailable(str(error), "engine_stopped")
        case ChatTemplateError():
            return bad_request(str(error), "messages", "chat_template_error")
        case UsageError() | TokenizerError():
            return bad_request(str(error))
        case OutOfMemoryError():
            return unavailable(str(error), "out_of_memory")
        case KuiperError():
            log.error("a request failed: %s", error)
            return ApiError(500, str(error), code="engine_error")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    log.error("a request failed unexpectedly", exc_info=error)
    return ApiError(500, "internal error; the server's log has details", code="internal_error")


def unavailable(message: str, code: str) -> ApiError:
    """Nothing is wrong with the request; it may succeed later, or elsewhere."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def invalid_body(details: list[ErrorDetails]) -> ApiError:
    """A body that is no JSON, or does not have the form that the endpoint wants: its first mistake."""
    first = details[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field: {param}", param, code="unknown_field")
    where = f"{param}: " if param else "the body: "
    return bad_request(f"{where}{first['msg']}", param, code=first["type"])


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


def add_handlers(app: FastAPI) -> None:
    """Let what is raised on purpose become an answer in OpenAI's form; `Gate` sees to the rest."""
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(KuiperError, _answer_error)
