"""Inputs that every operator must get right, found by tests and benchmarks of every back end."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kuiperllm.core import Tensor
from kuiperllm.core.layout import extent

Arrays = Mapping[str, Any]


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
    benchmark: bool = False
    """Whether this is a shape worth timing."""

    @property
    def id(self) -> str:
        """Operator and case, for reports."""
        return f"{self.op}-{self.name}"

    @property
    def op(self) -> str:
        """The operator's name: its function's or, if that is a private wrapper, its package's."""
        name, package = self.function.__name__, self.function.__module__.rpartition(".")[2]
        return package if name.startswith("_") else name

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """The arguments as NumPy sees them; the same for the same seed."""
        return dict(self.make(np.random.default_rng(seed)))

    def expected(self, arguments: Arrays) -> tuple[np.ndarray[Any, Any], ...]:
        """What the reference says."""
        result = self.reference(**arguments)
        return result if isinstance(result, tuple) else (result,)

    def run(self, tensors: Arrays) -> tuple[Tensor, ...]:
        """Call the operator; what it changed and returned, as `expected` orders it."""
        returned = self.function(**tensors)
        changed = [tensors[name] for name in self.writes]
        returned = returned if isinstance(returned, tuple) else (returned,)
        return (*changed, *(r for r in returned if r is not None and not any(r is c for c in changed)))

    def compare(self, found: tuple[Tensor, ...], expected: tuple[np.ndarray[Any, Any], ...]) -> None:
        """Raise AssertionError unless the results match."""
        assert len(found) == len(expected), f"{len(found)} results, not {len(expected)}"
        for tensor, array in zip(found, expected, strict=True):
            if np.issubdtype(array.dtype, np.integer):
                np.testing.assert_array_equal(tensor.numpy(), array)
            else:
                np.testing.assert_allclose(tensor.numpy(), array, rtol=self.rtol, atol=self.atol)


def to_tensors(arguments: Arrays, device: str = "cpu") -> dict[str, Any]:
    """Copies of the arrays on a device, with the same strides; other arguments stay what they are."""
    return {k: _to_tensor(v, device) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


def _to_tensor(array: np.ndarray[Any, Any], device: str) -> Tensor:
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
