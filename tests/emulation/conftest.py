"""Runs a piece of CUDA C++ on the emulated device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuiperllm.core import Device, Tensor

Run = Callable[..., tuple[np.ndarray[Any, Any], ...]]


@pytest.fixture
def emulator(emulated_cuda: Device) -> Iterator[Any]:
    """The driver of the emulated device, in its plain schedule."""
    import emulation

    driver = emulation.driver()
    yield driver
    driver.seed, driver.overlaps, driver.max_seconds = 0, True, 120


@pytest.fixture
def run(emulator: Any, tmp_path: Path) -> Run:
    """`run(body, block, *arguments, grid=1, shared=0, head="")`: what the arrays hold afterwards.

    The body is that of a kernel whose parameters are named a, b, c and so on: pointers for arrays, numbers.
    """
    from kuiperllm.backends.cuda.launch import Kernel, launch

    numbers = itertools.count()

    def call(
        body: str,
        block: int,
        *arguments: np.ndarray[Any, Any] | int | float,
        grid: int | tuple[int, ...] = 1,
        shared: int = 0,
        head: str = "",
    ) -> tuple[np.ndarray[Any, Any], ...]:
        source = tmp_path / f"probe{next(numbers)}.cu"
        names = "abcdefgh"[: len(arguments)]
        parameters = ", ".join(f"{_type(x)} {name}" for x, name in zip(arguments, names, strict=True))
        source.write_text(
            f'#include "mma.cuh"\n{head}\nextern "C" __global__ void probe({parameters}) {{\n'
            f"wait_for_previous();\n{body}\n}}\n"
        )
        on_device = [_to_device(x) for x in arguments]
        launch(Kernel(source, "probe"), grid, block, *on_device, shared=shared)
        return tuple(x.numpy().copy() for x in on_device if isinstance(x, Tensor))

    return call


def _to_device(value: Any) -> Any:
    return Tensor.from_numpy(value, copy=True).to("cuda:0") if isinstance(value, np.ndarray) else value


def _type(value: object) -> str:
    if isinstance(value, np.ndarray):
        kinds = {"float32": "float", "int32": "int", "uint8": "unsigned char", "int64": "long long"}
        return kinds[str(value.dtype)] + "*"
    return "int" if isinstance(value, int) else "float"
