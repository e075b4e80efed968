"""A quantized matrix on CUDA as kernels see it: template parameters, and where its codes lie."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.linear.weight import LinearWeight, WeightFormat
from kuiperllm.quant import Scheme

_COLUMNS = Path(__file__).with_name("columns.cu")
_BLOCK = 256


@lru_cache(maxsize=256)
def template(format: WeightFormat) -> dict[str, int | str | DType]:
    """The template parameters that kernels have for weights of a format."""
    if not isinstance(format, Scheme):
        return {"BITS": 0, "CODING": "MIDDLE", "SCALE": DType.float16}
    return {"BITS": format.bits, "CODING": format.coding.upper(), "SCALE": format.scale}


def plane_bits(scheme: Scheme) -> tuple[int, int]:
    """Bits of a code in the first plane, and in the second one: 0 if there is none."""
    low = 8 if scheme.bits == 8 else 4 if scheme.bits >= 4 else 2
    return low, scheme.bits - low


def second_plane(weight: LinearWeight) -> Tensor | None:
    """Where the second plane of codes begins; the first one begins where the data does."""
    if weight.scheme is None:
        return None
    low, high = plane_bits(weight.scheme)
    return weight.data[weight.out_features * weight.in_features * low // 8 :] if high else None


def in_stored_order(x: Tensor, weight: LinearWeight) -> Tensor:
    """x with its columns in the order in which the matrix is stored; x itself, if that is its own."""
    if weight.columns is None:
        return x
    out = Tensor.empty(x.shape, x.dtype, x.device)
    rows, columns = x.shape
    grid = (-(-columns // _BLOCK), min(rows, 65535))
    launch(_gather(x.dtype), grid, _BLOCK, x, weight.columns, out, rows, columns, x.strides[0])
    return out


@cache
def _gather(dtype: DType) -> Kernel:
    return Kernel(_COLUMNS, "gather_columns", T=dtype)
