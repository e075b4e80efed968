"""Brings the tensors of a checkpoint into the layout of a device, one after the other.

Besides the packed weights, memory holds one piece of a tensor at a time: pages of a mapped file are given up
as soon as they are packed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint import Checkpoint, Weight
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import CheckpointError, UnsupportedError
from kuiperllm.ops.linear import LinearWeight, Rows
from kuiperllm.quant import Q8Tensor

log = logging.getLogger(__name__)

_PIECE_BYTES = 8 << 20
_GROUP_SIZES = (128, 64, 32)

Progress = Callable[[int, int], None]
"""Told of progress as (bytes done, bytes in all), as the file counts them."""


class WeightLoader:
    """Reads tensors by name, checks their shapes and packs them for a device.

    Args:
        checkpoint: where the tensors are.
        device: where they go.
        dtype: what floating-point matrices are kept in; None keeps what the checkpoint holds.
        quant: `q8` rounds floating-point matrices to int8 groups.
        group_size: columns that share a scale if `quant` is set; halved for matrices that it does not divide.
        progress: is told after each tensor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        *,
        dtype: DType | None = None,
        quant: str | None = None,
        group_size: int = 64,
        progress: Progress | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.quant = quant
        self.group_size = group_size
        self._progress = progress
        self._total_bytes = sum(info.nbytes for info in checkpoint.tensors.values())
        self._done_bytes = 0
        self._not_quantized: set[int] = set()
        self.packed_bytes = 0
        """Memory of everything loaded so far."""

    def vector(self, name: str, size: int) -> Tensor:
        """A one-dimensional tensor, such as the weight of a norm, in float32.

        Raises:
            CheckpointError: it is missing or has another shape.
        """
        self.expect_vector(name, size)
        values = np.array(self._float(name), np.float32)  # a copy: the file's pages are given up
        self._finish(name)
        self.packed_bytes += values.nbytes
        return Tensor.from_numpy(values).to(self.device)

    def matrix(
        self, names: Sequence[str], sizes: Sequence[int], columns: int, *, bias: bool = False
    ) -> LinearWeight:
        """One matrix from the rows of several: the projections `names` stacked in this order.

        Args:
            names: modules, such as `model.layers.0.self_attn.q_proj`, whose tensor is `<name>.weight`.
            sizes: the rows of each.
            columns: the columns of all.
            bias: whether they have biases, `<name>.bias`.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or holds what cannot be quantized.
            UnsupportedError: a weight is too large to be quantized.
        """
        self.expect_matrix(names, sizes, columns, bias=bias)
        parts = [self.checkpoint.load(f"{name}.weight") for name in names]
        weight = self._empty(parts, sum(sizes), columns, bias)
        first = 0
        for name, rows in self._pieces(names, parts, weight):
            try:
                weight.write_rows(first, rows)
            except (CheckpointError, UnsupportedError) as error:
                raise type(error)(f"{self.checkpoint.path}: weights of {name}: {error}") from None
            first += rows.shape[0]
        first = 0
        for name, size in zip(names, sizes, strict=True):
            self._finish(f"{name}.weight")
            if bias:
                weight.write_bias(first, self._float(f"{name}.bias"))
                self._finish(f"{name}.bias")
            first += size
        self.packed_bytes += weight.nbytes
        return weight

    def expect_vector(self, name: str, size: int) -> None:
        """Refuse a `vector` that is missing or has another shape."""
        self.checkpoint.expect(name, (size,))

    def expect_matrix(self, names: Sequence[str], sizes: Sequence[int], columns: int, *, bias: bool) -> None:
        """Refuse a `matrix` whose tensors are missing or have other shapes."""
        for name, size in zip(names, sizes, strict=True):
            self.checkpoint.expect(f"{name}.weight", (size, columns))
            if bias:
                self.checkpoint.expect(f"{name}.bias", (size,))

    def _empty(self, parts: list[Weight], rows: int, columns: int, bias: bool) -> LinearWeight:
        """Memory in the format that these parts are kept in."""
        stored = [part for part in parts if isinstance(part, Q8Tensor)]
        if len(stored) == len(parts) and len({part.group_size for part in stored}) == 1:
            return LinearWeight.empty(
                "q8",
                rows,
                columns,
                group_size=stored[0].group_size,
                scale_dtype=DType.of(stored[0].scales.dtype),
                bias=bias,
                device=self.device,
            )
        if self.quant == "q8":
            group = next((g for g in _GROUP_SIZES if g <= self.group_size and columns % g == 0), 0)
            if group:
                return LinearWeight.empty(
                    "q8", rows, columns, group_size=group, bias=bias, device=self.device
                )
            if columns not in self._not_quantized:  # once, not for every layer
                log.warning("rows of %d weights cannot be cut into int8 groups of 32; not quantized", columns)
                self._not_quantized.add(columns)
        floats = [part.dtype.name for part in parts if not isinstance(part, Q8Tensor)]
        format = str(self.dtype) if self.dtype is not None else floats[0] if floats else "bfloat16"
        return LinearWeight.empty(format, rows, columns, bias=bias, device=self.device)

    @staticmethod
    def _pieces(
        names: Sequence[str], parts: list[Weight], weight: LinearWeight
    ) -> Iterator[tuple[str, Rows]]:
        """Whose rows, and the rows as `write_rows` takes them: a multiple of 16 unless they are the last."""
        if any(part.shape[0] % 16 for part in parts[:-1]):
            names, parts = [", ".join(names)], [_stacked(parts)]
        for name, part in zip(names, parts, strict=True):
            if not isinstance(part, Q8Tensor) or part.group_size == weight.group_size:
                yield name, part
                continue
            step = max(16, _PIECE_BYTES // (4 * part.shape[1]) // 16 * 16)
            for first in range(0, part.shape[0], step):
                piece = slice(first, first + step)
                yield name, Q8Tensor(part.values[piece], part.scales[piece]).dequantize()

    def _float(self, name: str) -> NDArray[Any]:
        return _floats(self.checkpoint.load(name))

    def _finish(self, name: str) -> None:
        self.checkpoint.release(name)
        self._done_bytes += self.checkpoint.tensors[name].nbytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


class ShapeChecker(WeightLoader):
    """Stands in for a `WeightLoader` to find out whether a checkpoint has all that a model asks for.

    What it gives has no values and takes no memory, so that a model can be refused before anything is loaded.
    """

    def vector(self, name: str, size: int) -> Tensor:
        """Like `WeightLoader.vector`, without the values."""
        self.expect_vector(name, size)
        return Tensor.empty((0,), DType.float32, self.device)

    def matrix(
        self, names: Sequence[str], sizes: Sequence[int], columns: int, *, bias: bool = False
    ) -> LinearWeight:
        """Like `WeightLoader.matrix`, without the values."""
        self.expect_matrix(names, sizes, columns, bias=bias)
        return LinearWeight("float32", sum(sizes), columns, Tensor.empty((0,), DType.uint8, self.device))


def _stacked(parts: list[Weight]) -> Weight:
    """The rows of all parts in one array."""
    stored = [part for part in parts if isinstance(part, Q8Tensor)]
    if len(stored) == len(parts) and len({part.group_size for part in stored}) == 1:
        return Q8Tensor(
            np.concatenate([part.values for part in stored]), np.concatenate([part.scales for part in stored])
        )
    return np.concatenate([_floats(part) for part in parts])


def _floats(stored: Weight) -> NDArray[Any]:
    return stored.dequantize() if isinstance(stored, Q8Tensor) else stored
