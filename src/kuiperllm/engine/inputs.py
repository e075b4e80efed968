"""Tensors that the host fills and the device reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from kuiperllm.core import Device, Tensor


class Input:
    """A tensor with its values on the host; on the host itself the two are one memory.

    Args:
        host: the values to begin with.
        device: where the tensor lives.
    """

    def __init__(self, host: np.ndarray[Any, Any], device: Device) -> None:
        self.host = host
        self.tensor = Tensor.from_numpy(host).to(device)

    def upload(self) -> None:
        """Make what was written to `host` visible on the device, for what is queued from now on."""
        if not self.tensor.device.is_host:
            self.tensor.copy_(Tensor.from_numpy(self.host))
