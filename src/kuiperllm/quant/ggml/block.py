"""What a GGUF tensor type is: a block of elements of fixed size, and how it unpacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.quant.q8 import Q8Tensor


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A tensor type of GGUF files."""

    number: int
    """The value in the file."""
    name: str
    """ggml's name, such as Q8_0."""
    dtype: str
    """What `unpack` gives: a data type's name, or `q8`."""
    block_size: int
    """Elements of a block, neighbours along the fastest dimension."""
    block_bytes: int
    unpack: Callable[[NDArray[np.uint8], tuple[int, ...]], NDArray[Any] | Q8Tensor]
    """From the bytes of a whole tensor, one-dimensional and contiguous, and its shape (slowest dimension
    first, the last one a multiple of `block_size`), to the tensor; a view where the layout allows."""
