"""Launches the CPU kernels of `embedding`."""

from __future__ import annotations

from functools import cache

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, num_threads
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.ops.linear.cpu_pack import padded_columns, scheme_parameters
from kuiperllm.quant import Scheme

_MODULE = "kuiperllm.ops.embedding.cpu_kernel"
_FORMATS = {DType.float32: 0, DType.float16: 1, DType.bfloat16: 2}


def embedding(ids: Tensor, table: LinearWeight, out: Tensor) -> None:
    """Unpack one row for each id."""
    vocab, width, stride = table.out_features, table.in_features, out.strides[0]
    if isinstance(table.format, Scheme):
        k, columns = padded_columns(width), table.columns
        launch(
            _codes(table.format, columns is not None),
            *(ids, table.data, ids if columns is None else columns, out),
            Tensor.empty((num_threads(), k * 16), DType.float32),
            *(vocab, width, k, stride),
            items=ids.shape[0],
        )
    else:
        launch(_float(table.format), ids, table.data, out, vocab, width, stride, items=ids.shape[0])


@cache
def _codes(scheme: Scheme, ordered: bool) -> Kernel:
    return Kernel(_MODULE, "embedding_codes", **scheme_parameters(scheme), ORDERED=ordered)


@cache
def _float(format: DType) -> Kernel:
    return Kernel(_MODULE, "embedding_float", FORMAT=_FORMATS[format])
