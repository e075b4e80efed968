"""The two orders in which checkpoints keep the rows of query and key projections.

Rotary embedding turns pairs of a head's channels. Hugging Face pairs channel i with i + d/2 (half-split);
Meta's own files, llama2.c and GGUF files of the architecture `llama` pair 2i with 2i + 1 (interleaved). The
models here know the half-split order alone, so the others are reordered while loading.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def half_split_order(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Row numbers [heads * head_dim] that take interleaved rows to half-split: `half_split = rows[order]`."""
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.transpose(0, 2, 1).reshape(-1)


def interleaved_order(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Row numbers [heads * head_dim] the other way: `interleaved = half_split[order]`."""
    rows = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return rows.transpose(0, 2, 1).reshape(-1)
