"""Finds the kernels of an operator for the device that its operands live on."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType

from kuiperllm.core import Device, DType
from kuiperllm.errors import KernelError

_OPS = "kuiperllm.ops"
_BACKENDS = "kuiperllm.backends"

_found: dict[tuple[str, str, DType], ModuleType] = {}


def implementation(op: str, device: Device, dtype: DType = DType.float32) -> ModuleType:
    """The module `kuiperllm.ops.<op>.<type of the device>`.

    Args:
        op: the operator.
        device: where its operands live.
        dtype: the type of its activations.

    Raises:
        KernelError: the operator has no kernels for this device and type; the message lists those it has.
    """
    module = _found.get((op, device.type, dtype))
    return module if module is not None else _find(op, device, dtype)


def _find(op: str, device: Device, dtype: DType) -> ModuleType:
    candidates = _candidates(op)
    if device.type not in candidates:
        raise no_kernel(op, str(device), dict.fromkeys(candidates, f"operands are on {device}"))
    module = importlib.import_module(f"{_OPS}.{op}.{device.type}")
    taken: tuple[DType, ...] = getattr(module, "DTYPES", (DType.float32,))
    if dtype not in taken:
        why = f"takes {' or '.join(str(kind) for kind in taken)}, not {dtype}"
        raise no_kernel(op, f"{device} with {dtype} activations", {device.type: why})
    _found[op, device.type, dtype] = module
    return module


def no_kernel(op: str, operands: str, refused: Mapping[str, str]) -> KernelError:
    """The error for operands that no kernel takes.

    Args:
        op: the operator.
        operands: what it was called with, in a word or two ("cuda:0", "cpu with float16 weights").
        refused: the kernels there are, and why each cannot take these operands.
    """
    reasons = ", ".join(f"{name} ({why})" for name, why in refused.items()) or "none"
    return KernelError(f"{op} on {operands}: no kernel; candidates: {reasons}")


def _candidates(op: str) -> list[str]:
    """The back ends that an operator has a module for."""
    backends, modules = (
        {module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)}
        for package in (_BACKENDS, f"{_OPS}.{op}")
    )
    return sorted(backends & modules)
