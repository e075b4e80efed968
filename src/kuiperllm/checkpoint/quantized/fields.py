"""Fields of a `quantization_config`, which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kuiperllm.checkpoint.base import brief
from kuiperllm.config import MAX_DIMENSION
from kuiperllm.errors import ConfigError


def as_bits(value: object) -> int | None:
    """4 or 8 if that is what it is; None for everything else."""
    return value if type(value) is int and value in (4, 8) else None


def group_size_of(config: Mapping[str, Any], where: str, *names: str) -> int | None:
    """The group size under one of some names: -1 for whole rows; None if it is not there.

    Raises:
        ConfigError: it is neither -1 nor a whole number from 1 up.
    """
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if value is None:
        return None
    if type(value) is not int or (value < 1 and value != -1):
        raise ConfigError(
            f"{where}: quantization_config: {names[0]} must be -1 or at least 1, not {brief(value)}"
        )
    return value


def block_of(value: object, where: str, name: str) -> tuple[int, int] | None:
    """Rows and columns of a block, as a list or as text such as `128x128`; None if it is not there.

    Raises:
        ConfigError: it is something else.
    """
    if value is None:
        return None
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list) and len(sizes) == 2:
        numbers = [int(size) if isinstance(size, str) and size.isdecimal() else size for size in sizes]
        if all(type(number) is int and 1 <= number <= MAX_DIMENSION for number in numbers):
            return numbers[0], numbers[1]
    raise ConfigError(f"{where}: quantization_config: {name} must be two whole numbers, not {brief(value)}")
