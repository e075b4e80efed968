"""Reading JSON that nobody vouches for: bounded in size, in number of values and in depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.mapping import MappedFile
from kuiperllm.errors import CheckpointError, ConfigError

MAX_CONFIG_BYTES = 4 << 20
# A value takes up to some hundred bytes once parsed, so three bytes of hostile text can cost a hundred of
# memory. The number of values is bounded before parsing; an honest header has about ten per tensor.
MAX_VALUES = 2_000_000


def read_json(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> Any:
    """The contents of a JSON file.

    Raises:
        CheckpointError: the file is missing, empty or unreadable.
        ConfigError: it is not JSON, or larger than any honest file of its kind.
    """
    file = MappedFile(path)
    if file.size > max_bytes:
        raise ConfigError(f"{path}: has {file.size} bytes; at most {max_bytes} are read")
    try:
        return parse_json(bytes(file.memory[:]))
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from None


def parse_json(text: bytes, *, unique_keys: bool = False) -> Any:
    """Parse JSON, optionally refusing an object that states a key twice.

    Raises:
        ValueError: it is not JSON, or has too many values, too deep a nesting or a repeated key.
    """
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique if unique_keys else None)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"{brief(key)} appears twice")
        unique[key] = value
    return unique


def read_config(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CheckpointError: the file is missing, empty or unreadable.
        ConfigError: it does not hold a JSON object.
    """
    raw = read_json(path, max_bytes=max_bytes)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {brief(raw)}")
    return raw


def require_file(path: Path, why: str) -> Path:
    """`path`, which must be a file; `why` ends the message when it is not.

    Raises:
        CheckpointError: there is no such file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: the file {path.name} is missing; {why}")
    return path
