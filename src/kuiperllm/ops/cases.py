"""Inputs that every operator must get right, found by tests and benchmarks of every back end."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.core.layout import extent
from kuiperllm.ops.contract import ACTIVATIONS

Arrays = Mapping[str, Any]

ROUNDING = {DType.float16: 2.5e-3, DType.bfloat16: 2e-2}
"""What results may be off by, relative to their size, where activations are rounded to 16 bits."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an operator, and the truth about it.

    `make` gives the arguments by name; NumPy arrays (strided ones included) stand for tensors. `reference`
    takes the same arguments and returns what the operator changes (the arguments named in `writes`, in that
    order) followed by what it returns, if that is not one of them: one array or a tuple of arrays.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[np.random.Generator], Arrays]
    rtol: float = 1e-6
    atol: float = 1e-6
    """Results must match within rtol * |reference| + atol; integers exactly."""
    writes: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    """The arguments that have the activations' type; where there are none, the type is float32."""
    prepare: Callable[..., dict[str, Any]] | None = None
    """Turns the arguments, as tensors, into those of `function`: what is made once and used often, such as
    packed weights. Those named in `writes` stay what they are."""
    device_reference: bool = False
    """Whether `reference` takes a keyword `device`, because devices round differently."""
    benchmark: bool = False
    """Whether this is a shape worth timing."""
    operations: int = 0
    """The multiplications and additions of its matrix products, if it has any."""

    @property
    def id(self) -> str:
        """Operator and case, for reports."""
        return f"{self.op}-{self.name}"

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.function.__name__

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """The types that its activations can have."""
        return ACTIVATIONS if self.activations else (DType.float32,)

    def arguments(self, seed: int = 0, dtype: DType = DType.float32) -> dict[str, Any]:
        """The arguments as NumPy sees them, activations rounded to `dtype`; the same for the same seed."""
        made = dict(self.make(np.random.default_rng(seed)))
        if dtype is not DType.float32:
            made |= {name: _cast(made[name], dtype) for name in self.activations if name in made}
        return made

    def expected(self, arguments: Arrays, device: Device | str = "cpu") -> tuple[np.ndarray[Any, Any], ...]:
        """What the reference says; it sees activations as float32, whatever they are rounded to."""
        wide = {k: v.astype(np.float32) if k in self.activations else v for k, v in arguments.items()}
        if self.device_reference:
            wide["device"] = Device(device)
        result = self.reference(**wide)
        return result if isinstance(result, tuple) else (result,)

    def tensors(self, arguments: Arrays, device: Device | str = "cpu") -> dict[str, Any]:
        """What `run` takes: the arguments on a device, prepared and in place."""
        made = to_tensors(arguments, device)
        if self.prepare is not None:
            made = self.prepare(**made)
            Device(device).synchronize()
        return made

    def run(self, tensors: Arrays) -> tuple[Tensor, ...]:
        """Call the operator; what it changed and returned, as `expected` orders it."""
        returned = self.function(**tensors)
        changed = [tensors[name] for name in self.writes]
        returned = returned if isinstance(returned, tuple) else (returned,)
        return (*changed, *(r for r in returned if r is not None and not any(r is c for c in changed)))

    def compare(
        self,
        found: tuple[Tensor, ...],
        expected: tuple[np.ndarray[Any, Any], ...],
        dtype: DType = DType.float32,
    ) -> None:
        """Raise AssertionError unless the results match.

        With float32 activations, within the case's tolerances. Others are rounded on the way: each result
        must lie within `ROUNDING` times its size plus the root mean square of all.
        """
        assert len(found) == len(expected), f"{len(found)} results, not {len(expected)}"
        for tensor, array in zip(found, expected, strict=True):
            if np.issubdtype(array.dtype, np.integer):
                np.testing.assert_array_equal(tensor.numpy(), array)
            elif dtype is DType.float32:
                np.testing.assert_allclose(tensor.numpy(), array, rtol=self.rtol, atol=self.atol)
            else:
                size = float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0
                rtol = ROUNDING[dtype]
                np.testing.assert_allclose(
                    tensor.numpy().astype(np.float32), array, rtol=rtol, atol=rtol * size + self.atol
                )


def _cast(array: np.ndarray[Any, Any], dtype: DType) -> np.ndarray[Any, Any]:
    """The array in another type, with the same strides (in elements)."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    _, last = extent(array.shape, strides)
    memory = as_strided(array, (last + 1,), (array.itemsize,)).astype(dtype.numpy)
    return as_strided(memory, array.shape, tuple(stride * memory.itemsize for stride in strides))


def to_tensors(arguments: Arrays, device: Device | str = "cpu") -> dict[str, Any]:
    """Copies of the arrays on a device, with the same strides; other arguments stay what they are."""
    return {k: _to_tensor(v, device) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


def _to_tensor(array: np.ndarray[Any, Any], device: Device | str) -> Tensor:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    first, last = extent(array.shape, strides)
    assert first == 0, "cases have no negative strides"
    memory = as_strided(array, (last + 1,), (array.itemsize,))
    flat = Tensor.from_numpy(memory, copy=True).to(device)
    return Tensor(flat.buffer, flat.dtype, array.shape, strides)


def all_cases() -> list[Case]:
    """The cases of every operator."""
    package = importlib.import_module("kuiperllm.ops")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)
    modules = (importlib.import_module(f"kuiperllm.ops.{name}") for name in names)
    return [case for module in modules for case in module.CASES]
