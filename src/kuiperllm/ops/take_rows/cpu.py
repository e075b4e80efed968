"""Launches the CPU kernel of `take_rows`."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import Tensor
from kuiperllm.ops.grid import grain

_TAKE_ROWS = Kernel("kuiperllm.ops.take_rows.cpu_kernel", "take_rows")


def take_rows(x: Tensor, rows: Tensor, out: Tensor) -> None:
    """One work item for each row that is taken."""
    tokens, width = x.shape
    launch(
        _TAKE_ROWS, x, rows, out, tokens, width, x.strides[0], out.strides[0],
        items=rows.shape[0], grain=grain(width),
    )  # fmt: skip
