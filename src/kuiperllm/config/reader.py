"""Typed access to the fields of a JSON object that nobody has checked yet."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any

from kuiperllm.errors import ConfigError

MAX_NUMBER = 1e300


class FieldReader:
    """Typed access to a JSON object, with errors that name the file and the field."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def integer(self, name: str, *, default: int | None = None, low: int, high: int = 1 << 62) -> int:
        """A whole number from `low` to `high`."""
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.where}: {name} is missing")
            return default
        fraction = isinstance(value, float) and not value.is_integer()  # infinity and NaN are fractions here
        if isinstance(value, bool) or not isinstance(value, int | float) or fraction:
            raise ConfigError(f"{self.where}: {name} must be a whole number, not {brief(value)}")
        if not low <= value <= high:
            raise ConfigError(f"{self.where}: {name}={brief(value)} is outside {low} to {high}")
        return int(value)

    def number(self, name: str, *, default: float | None = None, low: float) -> float:
        """A finite number, at least `low`."""
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.where}: {name} is missing")
            return default
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not -MAX_NUMBER <= value <= MAX_NUMBER:  # also refuses NaN
            raise ConfigError(f"{self.where}: {name} must be a finite number, not {brief(value)}")
        if value < low:
            raise ConfigError(f"{self.where}: {name}={value} is below {low}")
        return float(value)

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        """True or false."""
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name} must be true or false, not {brief(value)}")
        return value

    def divisors(self, name: str) -> tuple[float, ...] | None:
        """A list of numbers above 0, or None."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, int | float) and 0 < v <= MAX_NUMBER for v in value
        ):
            raise ConfigError(f"{self.where}: {name} must be a list of numbers above 0, not {brief(value)}")
        return tuple(float(v) for v in value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; negative ones stand for none."""
        value = self.raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ConfigError(
                f"{self.where}: {name} must be a token id or a list of them, not {brief(value)}"
            )
        return tuple(i for i in ids if i >= 0)
