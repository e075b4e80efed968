"""A tensor that several files hold parts of, as model-parallel training leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.torch_file import TorchFile, TorchTensor

_PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of one file."""

    file: TorchFile
    tensor: TorchTensor


class ShardedTensor:
    """Parts of one data type that lie side by side.

    Args:
        parts: at least one; all of the same shape but for `axis`.
        axis: 0 or 1, along which they are concatenated.
    """

    def __init__(self, parts: Sequence[Part], axis: int = 0) -> None:
        self.parts = tuple(parts)
        self.axis = axis
        shape = list(parts[0].tensor.shape)
        shape[axis] = sum(part.tensor.shape[axis] for part in parts)
        self.shape = tuple(shape)
        self.dtype = parts[0].tensor.dtype
        self.nbytes = sum(part.tensor.nbytes for part in parts)

    def load(self, order: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """The whole tensor: a view where there is one part, else a copy, made from one part after the other.

        Args:
            order: row numbers; the result is `tensor[order]`.

        Raises:
            CheckpointError: a file is closed.
        """
        if len(self.parts) == 1:
            array = np.ascontiguousarray(self.parts[0].file.array(self.parts[0].tensor))
            return array if order is None else array[order]
        whole = np.empty(self.shape, self.dtype)
        place = None if order is None else np.argsort(order)  # where each row goes
        first = 0
        for part in self.parts:
            array = part.file.array(part.tensor)
            last = first + array.shape[self.axis]
            if self.axis == 1:
                whole[:, first:last] = array
            elif place is None:
                whole[first:last] = array
            else:
                whole[place[first:last]] = array
            part.file.release(part.tensor)
            first = last
        return whole

    def release(self) -> None:
        """Let the system drop the pages of all parts."""
        for part in self.parts:
            part.file.release(part.tensor)

    def equals(self, other: ShardedTensor) -> bool:
        """Whether both hold the same bytes; read some megabytes at a time, up to the first difference.

        Raises:
            CheckpointError: a file is closed.
        """
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        if (self.parts, self.axis) == (other.parts, other.axis):
            return True
        rows = max(1, _PIECE_BYTES // max(1, self.nbytes // self.shape[0]))
        for first in range(0, self.shape[0], rows):
            last = first + rows
            same = np.array_equal(self._bytes_of_rows(first, last), other._bytes_of_rows(first, last))
            self.release()
            other.release()
            if not same:
                return False
        return True

    def _bytes_of_rows(self, first: int, last: int) -> NDArray[np.uint8]:
        """The bytes of some rows, one axis more than the tensor has."""
        pieces, start = [], 0
        for part in self.parts:
            array = part.file.bytes_of(part.tensor)
            if self.axis == 1:
                pieces.append(array[first:last])
            else:
                pieces.append(array[max(0, first - start) : max(0, last - start)])
                start += len(array)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)
