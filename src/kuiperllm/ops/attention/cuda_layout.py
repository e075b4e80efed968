"""How CUDA kernels of attention see heads and caches."""

from __future__ import annotations

from kuiperllm.backends.cuda.rows import VECTOR_BYTES, vector_width
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.attention.cache import LayerCache

_WIDEST_TILE = 256  # elements of a head that the tensor-core kernels have registers for


def lanes(head_dim: int, *dtypes: DType) -> int:
    """Lanes that hold a head of a token, as in head.cuh."""
    widest = max(VECTOR_BYTES // dtype.itemsize for dtype in dtypes)
    half = head_dim // 2
    steps = half if half % widest else half // widest
    return min(32, 1 << (steps - 1).bit_length())


def takes_tensor_cores(dtype: DType, cache: LayerCache) -> bool:
    """Whether the kernels that multiply 16-bit tiles can be used."""
    head_dim = cache.head_dim
    return (
        dtype.itemsize == 2 and cache.keys.dtype is dtype and head_dim % 8 == 0 and head_dim <= _WIDEST_TILE
    )


def decodes_on_tensor_cores(dtype: DType, cache: LayerCache) -> bool:
    """The same for the kernel for single tokens, which wants both halves of a head to be whole vectors."""
    return takes_tensor_cores(dtype, cache) and cache.head_dim % 16 == 0


def is_aligned(x: Tensor) -> bool:
    """Whether vector loads of the heads of x [T, H, d] are aligned, or heads are too odd for vectors."""
    head_dim = x.shape[-1]
    return head_dim % 8 != 0 or vector_width(head_dim, x.dtype, x) > 1
