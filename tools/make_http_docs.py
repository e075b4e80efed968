"""Write docs/reference/http.md from the server's own OpenAPI description.

Needs the extra `server`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "reference" / "http.md"

HEADER = """\
# HTTP

Made by `tools/make_http_docs.py` from the server's OpenAPI description, which `kuiper serve` itself gives at
`/openapi.json`; do not edit. What the fields mean together, output of a form, calls of functions, errors:
[server](../server.md).

Bodies are JSON. A field that is not listed is an error. `null` is as good as leaving a field out. Limits that
depend on the model, such as the ids of tokens, are those of the demo model here.
"""
FROM_FRAMEWORK = ("HTTPValidationError", "ValidationError")
METHODS = ("get", "post")


def document() -> str:
    """The whole page."""
    description = asyncio.run(_description())
    schemas = {
        name: schema
        for name, schema in sorted(description["components"]["schemas"].items())
        if name not in FROM_FRAMEWORK
    }
    sections = [HEADER.strip(), "## Endpoints"]
    for path, operations in description["paths"].items():
        sections += ["".join(_operation(method, path, operations[method])).strip() for method in operations]
    sections.append("## Objects")
    sections += ["".join(_schema(name, schema)).strip() for name, schema in schemas.items()]
    return "\n\n".join(sections) + "\n"


async def _description() -> dict[str, Any]:
    from kuiperllm import AsyncLLM
    from kuiperllm.server.app import create_app

    llm = AsyncLLM(device="cpu", warm_up=False)
    try:
        description: dict[str, Any] = create_app(llm).openapi()
        return description
    finally:
        await llm.shutdown()


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}\n\n{_text(operation.get('description'))}\n\n"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        yield f"Takes {_kind(body)}.\n\n"
    yield "| status | | body |\n| --- | --- | --- |\n"
    for status, response in operation["responses"].items():
        contents = response.get("content", {})
        kinds = [
            "a stream of events" if media == "text/event-stream" else _kind(content["schema"])
            for media, content in contents.items()
            if content["schema"]
        ]
        yield f"| {status} | {_text(response.get('description'))} | {' or '.join(kinds)} |\n"
    yield "\n"


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}\n\n{_text(schema.get('description'))}\n\n"
    properties = schema.get("properties", {})
    if not properties:
        return
    required = schema.get("required", [])
    yield "| field | | |\n| --- | --- | --- |\n"
    for field, facts in properties.items():
        notes = [_text(facts.get("description"))]
        if field in required:
            notes.insert(0, "Required.")
        elif facts.get("default") is not None:
            notes.append(f"Default: `{facts['default']}`.")
        yield f"| `{field}` | {_kind(facts)} | {' '.join(filter(None, notes))} |\n"
    yield "\n"


def _kind(schema: Mapping[str, Any]) -> str:
    """A type in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            kinds = [_kind(kind) for kind in schema[choice] if kind.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        items = schema.get("items")
        return f"list of {_kind(items)}{_limits(schema)}" if items else "list"
    return f"{kind}{_limits(schema)}"


def _limits(schema: Mapping[str, Any]) -> str:
    low = schema.get("minimum", schema.get("minLength", schema.get("minItems")))
    high = schema.get("maximum", schema.get("maxLength", schema.get("maxItems", schema.get("maxProperties"))))
    unit = {"string": " characters", "array": " of them", "object": " fields"}.get(schema.get("type", ""), "")
    bounds = []
    if low is not None and not (unit and low == 0):
        bounds.append(f"from {low:,}")
    if "exclusiveMinimum" in schema:
        bounds.append(f"above {schema['exclusiveMinimum']:,}")
    if high is not None:
        bounds.append(f"to {high:,}")
    if "exclusiveMaximum" in schema:
        bounds.append(f"below {schema['exclusiveMaximum']:,}")
    return f", {' '.join(bounds)}{unit}" if bounds else ""


def _text(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    OUTPUT.write_text(document(), encoding="utf-8")
