"""The chat page: files that a browser gets, and what it may do with them."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_HEADERS = {
    # Nothing from elsewhere, no scripts or styles inside a document: what a model writes cannot become one.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Serve `/` and the files that it needs under `/static/`."""
    folder = files("kuiperllm.server") / "static"
    contents = {
        file.name: Response(
            file.read_bytes(), media_type=_TYPES[file.name[file.name.rindex(".") :]], headers=_HEADERS
        )
        for file in folder.iterdir()
        if "." in file.name
    }

    async def page(request: Request) -> Response:
        return contents["index.html"]

    async def static(request: Request, name: str) -> Response:
        from kuiperllm.server.errors import ApiError

        if name not in contents:
            raise ApiError(404, f"there is no {request.url.path}")
        return contents[name]

    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/static/{name}", static, methods=["GET"], include_in_schema=False)
