"""Devices, memory, data types and tensors. No mathematics lives here."""

from kuiperllm.core.allocator import Allocator, MemoryStats
from kuiperllm.core.device import Device
from kuiperllm.core.dtype import DType
from kuiperllm.core.memory import Buffer
from kuiperllm.core.tensor import Tensor

__all__ = ["Allocator", "Buffer", "DType", "Device", "MemoryStats", "Tensor"]
