"""Launches the CPU kernels of `embedding`."""

from __future__ import annotations

from functools import cache

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.quant import Scheme

_MODULE = "kuiperllm.ops.embedding.cpu_kernel"
_FORMATS = {DType.float32: 0, DType.float16: 1, DType.bfloat16: 2}


def embedding(ids: Tensor, table: LinearWeight, out: Tensor) -> None:
    """Unpack one row for each id."""
    sizes = table.out_features, table.in_features, out.strides[0]
    if isinstance(table.format, Scheme):
        assert table.scales is not None
        kernel = _q8(table.group_size, table.format.scale is DType.float16)
        launch(kernel, ids, table.data, table.scales, out, *sizes, items=ids.shape[0])
    else:
        launch(_float(table.format), ids, table.data, out, *sizes, items=ids.shape[0])


@cache
def _q8(group: int, half: bool) -> Kernel:
    return Kernel(_MODULE, "embedding_q8", GROUP=group, HALF_SCALES=half)


@cache
def _float(format: DType) -> Kernel:
    return Kernel(_MODULE, "embedding_float", FORMAT=_FORMATS[format])
