"""JSON schemas before llguidance sees them: bounds for what takes it minutes, `oneOf` that is `anyOf`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from kuiperllm.errors import UsageError

# Compiling takes time by the square of the first two, and in proportion to the third: a second at most each.
MAX_PROPERTIES = 2000
MAX_PATTERNS = 64
MAX_MULTIPLE = 20_000
MAX_NODES = 20_000

Schema = dict[str, Any]


def check_schema(schema: Schema) -> None:
    """Refuse what is too much, counted over the whole schema.

    Raises:
        UsageError: there is too much of something.
    """
    properties = patterns = 0
    multiple = 1
    for nodes, node in enumerate(_nodes(schema), start=1):
        properties += _size(node.get("properties"))
        patterns += _size(node.get("patternProperties"))
        multiple = math.lcm(multiple, _numerator(node.get("multipleOf")))
        _require("objects", nodes, MAX_NODES)
        _require("properties", properties, MAX_PROPERTIES)
        _require("patternProperties", patterns, MAX_PATTERNS)
        if multiple > MAX_MULTIPLE:
            raise UsageError(f"the JSON schema's multipleOf together must not go beyond {MAX_MULTIPLE}")


def _require(what: str, count: int, most: int) -> None:
    if count > most:
        raise UsageError(f"the JSON schema has more than {most} {what}")


def _nodes(schema: object) -> Iterator[Schema]:
    """All objects in a schema."""
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def _size(value: object) -> int:
    return len(value) if isinstance(value, dict) else 0


def _numerator(value: object) -> int:
    """The digits of a number without the zeros at its end: 2500 and 0.25 are both 25."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return 1
    try:
        digits = Decimal(str(value)).normalize().as_tuple().digits
    except InvalidOperation:
        return 1
    return int("".join(map(str, digits))) or 1


# --- oneOf ------------------------------------------------------------------------------------------------


def without_one_of(schema: Schema) -> Schema:
    """The schema with `anyOf` in the place of each `oneOf` whose alternatives exclude each other.

    They do if they are of different types, or objects that differ in the value of a property that all of them
    require: what a union of Python's classes with a `Literal` in each looks like.
    """
    made: Schema = _rewritten(schema, schema)
    return made


def _rewritten(node: Any, root: Schema) -> Any:
    if isinstance(node, list):
        return [_rewritten(item, root) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _rewritten(value, root) for key, value in node.items()}
    alternatives = node.get("oneOf")
    if "anyOf" not in node and isinstance(alternatives, list) and _exclusive(alternatives, root):
        made["anyOf"] = made.pop("oneOf")
        made.pop("discriminator", None)
    return made


def _exclusive(alternatives: list[Any], root: Schema) -> bool:
    resolved = [_resolve(one, root) for one in alternatives]
    if not all(isinstance(one, dict) for one in resolved):
        return False
    if _disjoint([_types(one) for one in resolved]):
        return True
    required = [set(map(str, one.get("required") or ())) for one in resolved]
    common = set.intersection(*required) if required else set()
    if any(_types(one) != {"object"} for one in resolved):
        return False
    return any(_disjoint([_values(one, name, root) for one in resolved]) for name in common)


def _resolve(schema: Any, root: Schema, depth: int = 0) -> Any:
    """What a reference inside the document leads to."""
    reference = schema.get("$ref") if isinstance(schema, dict) else None
    if not isinstance(reference, str) or depth > 32:
        return schema
    if not reference.startswith("#/") or len(schema) > 1:
        return None
    found: Any = root
    for part in reference[2:].split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return _resolve(found, root, depth + 1)


def _types(schema: Schema) -> set[str] | None:
    """The types that a schema allows; None: unknown."""
    kind = schema.get("type")
    kinds = {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else None
    if kinds is not None and "number" in kinds:
        kinds.add("integer")
    return kinds


def _values(schema: Schema, name: str, root: Schema) -> set[str] | None:
    """The values that a property may have, as text; None: unknown."""
    properties = schema.get("properties")
    found = _resolve(properties.get(name), root) if isinstance(properties, dict) else None
    if not isinstance(found, dict):
        return None
    values = [found["const"]] if "const" in found else found.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return None
    return set(values)


def _disjoint(sets: list[set[str] | None]) -> bool:
    """Whether all are known and no two have anything in common."""
    seen: set[str] = set()
    for one in sets:
        if one is None or one & seen:
            return False
        seen |= one
    return True
