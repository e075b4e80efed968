"""The data types that a tensor can hold."""

from __future__ import annotations

from enum import Enum
from typing import Any

import ml_dtypes
import numpy as np

from kuiperllm.errors import DTypeError


class DType(Enum):
    """An element type; the value is its name. `bfloat16` comes to NumPy through `ml_dtypes`."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"
    uint8 = "uint8"
    int32 = "int32"
    int64 = "int64"

    __hash__ = object.__hash__  # there is one object for each; Enum's hash is several times as slow

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _NUMPY[self].itemsize

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype with the same layout."""
        return _NUMPY[self]

    @property
    def is_float(self) -> bool:
        """Whether this is a floating-point type."""
        return self in (DType.float32, DType.float16, DType.bfloat16)

    @classmethod
    def of(cls, value: DType | str | np.dtype[Any] | type[Any]) -> DType:
        """The data type with this name or this NumPy dtype.

        Raises:
            DTypeError: there is none; the message lists those there are.
        """
        if isinstance(value, DType):
            return value
        name = value if isinstance(value, str) else np.dtype(value).name
        try:
            return cls(name)
        except ValueError:
            raise DTypeError(
                f"data type {name!r} is not supported; supported: {', '.join(d.value for d in cls)}"
            ) from None

    def __str__(self) -> str:
        return self.value


_NUMPY: dict[DType, np.dtype[Any]] = {
    DType.float32: np.dtype(np.float32),
    DType.float16: np.dtype(np.float16),
    DType.bfloat16: np.dtype(ml_dtypes.bfloat16),
    DType.int8: np.dtype(np.int8),
    DType.uint8: np.dtype(np.uint8),
    DType.int32: np.dtype(np.int32),
    DType.int64: np.dtype(np.int64),
}
