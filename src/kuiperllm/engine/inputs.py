"""Small arrays that the host fills and the device reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kuiperllm.core import Device, DType, Tensor

_ALIGNMENT = 64

Fields = dict[str, tuple[Any, tuple[int, ...]]]
"""Type and shape of arrays, by name."""


class Inputs:
    """Arrays side by side in one piece of memory, so that one copy brings all of them to the device.

    On the host itself there is only one memory, and nothing to copy.

    Args:
        device: where the tensors live.
        fields: type and shape of each array, by name, in the order in which they lie.

    Attributes:
        host: the arrays to write to, zero at first.
        tensors: the same on the device.
    """

    def __init__(self, device: Device, fields: Fields) -> None:
        self._starts: dict[str, int] = {}
        end = 0
        for name, (dtype, shape) in fields.items():
            self._starts[name] = end
            end += -(-np.dtype(dtype).itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        self._bytes = np.zeros(max(end, 1), np.uint8)
        self._device_bytes = None if device.is_host else Tensor.from_numpy(self._bytes).to(device)
        self.host: dict[str, np.ndarray[Any, Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, (dtype, shape) in fields.items():
            start = self._starts[name]
            size = np.dtype(dtype).itemsize * math.prod(shape)
            self.host[name] = array = self._bytes[start : start + size].view(dtype).reshape(shape)
            if self._device_bytes is None:
                self.tensors[name] = Tensor.from_numpy(array)
            else:
                self.tensors[name] = Tensor(
                    self._device_bytes.buffer, DType.of(array.dtype), shape, None, start
                )

    def upload(self, first: str | None = None) -> None:
        """Make what was written visible on the device, for what is queued from now on.

        Args:
            first: leave out the arrays in front of this one.
        """
        if self._device_bytes is not None:
            start = 0 if first is None else self._starts[first]
            self._device_bytes[start:].copy_(Tensor.from_numpy(self._bytes[start:]))
