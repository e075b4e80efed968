"""What passes have to know of the running sequences, in arrays: one row for each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.engine.sequence import Sequence

PARAMETERS = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32, "seeds": np.int64,
}  # fmt: skip
"""What a draw depends on, as `ops.sample` wants it."""


class Rows:
    """Blocks and sampling parameters of sequences, by `Sequence.row`.

    Args:
        count: how many rows.
        table_width: most blocks of a sequence.
        block_size: tokens in a block.
    """

    def __init__(self, count: int, table_width: int, block_size: int) -> None:
        self.count = count
        self.table = np.zeros((count, table_width), np.int32)
        self.parameters: dict[str, NDArray[Any]] = {
            name: np.zeros(count, dtype) for name, dtype in PARAMETERS.items()
        }
        self._block_size = block_size

    def update(self, sequences: Iterable[Sequence]) -> None:
        """Take in what is new of sequences that have just come, or have got blocks."""
        for sequence in sequences:
            row, params, parameters = sequence.row, sequence.params, self.parameters
            count = len(sequence.blocks)
            self.table[row, :count] = sequence.blocks
            self.table[row, count:] = 0  # kernels may look further than a sequence goes
            parameters["temperature"][row] = params.temperature
            parameters["top_k"][row] = params.top_k
            parameters["top_p"][row] = params.top_p
            parameters["min_p"][row] = params.min_p
            parameters["seeds"][row] = np.uint64(sequence.seed).astype(np.int64)

    def slots(self, rows: NDArray[np.intp], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the keys and values of tokens go: of each, its sequence's row and its place there."""
        blocks, within = np.divmod(places, self._block_size)
        found: NDArray[np.int64] = self.table[rows, blocks].astype(np.int64) * self._block_size + within
        return found
