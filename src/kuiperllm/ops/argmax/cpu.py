"""Launches the CPU kernels of `argmax`: chunks of rows, then their winners."""

from __future__ import annotations

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.grid import grain

_MODULE = "kuiperllm.ops.argmax.cpu_kernel"
_CHUNKS = Kernel(_MODULE, "argmax_chunks")
_WINNERS = Kernel(_MODULE, "argmax_winners")
_CHUNK = 16384


def argmax(x: Tensor, out: Tensor) -> None:
    """Of each row of x [T, V], the index of the largest element to out [T]."""
    tokens, width = x.shape
    chunks = -(-width // _CHUNK)
    values = Tensor.empty((tokens, chunks))
    places = Tensor.empty((tokens, chunks), DType.int32)
    launch(
        _CHUNKS, x, values, places, width, x.strides[0], _CHUNK, chunks,
        items=tokens * chunks, grain=grain(min(width, _CHUNK)),
    )  # fmt: skip
    launch(_WINNERS, values, places, out, chunks, items=tokens, grain=grain(chunks))
