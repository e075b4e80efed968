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
from kuiperllm.ops.linear import LinearWeight, Rows, WeightFormat, can_be_kept
from kuiperllm.quant import AT_LOAD, QuantTensor, concatenate

log = logging.getLogger(__name__)

_PIECE_BYTES = 8 << 20
_GROUP_SIZES = (128, 64, 32)
UNPACKED = DType.bfloat16
"""What quantized matrices are kept in that no kernel takes as they are."""

Progress = Callable[[int, int], None]
"""Told of progress as (bytes done, bytes in all), as the file counts them."""


class WeightLoader:
    """Reads tensors by name, checks their shapes and packs them for a device.

    Args:
        checkpoint: where the tensors are.
        device: where they go.
        dtype: what floating-point matrices are kept in; None keeps what the checkpoint holds.
        quant: `q8` or `q4` rounds floating-point matrices to int8 or int4 groups.
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
        self._warned: set[tuple[int, str]] = set()
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

    def matrices(
        self, names: Sequence[str], sizes: Sequence[int], columns: int, *, bias: bool = False
    ) -> list[LinearWeight]:
        """The rows of several matrices: the projections `names` stacked in this order.

        Neighbours that are kept in one format make one matrix. A checkpoint that quantizes some of them in
        another way than others gives several.

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
        weights = []
        for first, after in self._runs(parts):
            weights.append(self._pack(names[first:after], parts[first:after], bias))
        return weights

    def matrix(self, name: str, rows: int, columns: int, *, bias: bool = False) -> LinearWeight:
        """One matrix; see `matrices`."""
        (weight,) = self.matrices([name], [rows], columns, bias=bias)
        return weight

    def _pack(self, names: Sequence[str], parts: list[Weight], bias: bool) -> LinearWeight:
        """The rows of parts that are kept in one format, as one matrix."""
        sizes, columns = [part.shape[0] for part in parts], parts[0].shape[1]
        order = parts[0].columns if isinstance(parts[0], QuantTensor) else None
        weight = LinearWeight.empty(
            self._kept_as(parts[0]), sum(sizes), columns, columns=order, bias=bias, device=self.device
        )
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

    def _runs(self, parts: list[Weight]) -> Iterator[tuple[int, int]]:
        """Ranges of neighbours that make one matrix."""
        first = 0
        for index in range(1, len(parts) + 1):
            if index == len(parts) or not self._go_together(parts[first], parts[index]):
                yield first, index
                first = index

    def _go_together(self, part: Weight, other: Weight) -> bool:
        if self._kept_as(part) != self._kept_as(other):
            return False
        of_part = part.columns if isinstance(part, QuantTensor) else None
        of_other = other.columns if isinstance(other, QuantTensor) else None
        if of_part is None or of_other is None:
            return of_part is of_other
        return np.array_equal(of_part, of_other)

    def _kept_as(self, part: Weight) -> WeightFormat:
        """The format that a matrix of a checkpoint is kept in: what is quantized stays as it is."""
        columns = part.shape[1]
        if isinstance(part, QuantTensor):
            if can_be_kept(part.scheme, columns):
                return part.scheme
            self._warn(
                columns, "rows of %d weights in groups of %d are not multiplied as such; they are unpacked",
                part.group_size,
            )  # fmt: skip
            return self.dtype or UNPACKED
        if self.quant is not None:
            groups = (group for group in _GROUP_SIZES if group <= self.group_size)
            schemes = (AT_LOAD[self.quant](group) for group in groups)
            if scheme := next((scheme for scheme in schemes if can_be_kept(scheme, columns)), None):
                return scheme
            self._warn(columns, "rows of %d weights cannot be cut into groups of %d; not quantized", 32)
        return self.dtype or DType.of(part.dtype)

    def _warn(self, columns: int, message: str, group: int) -> None:
        if (columns, message) not in self._warned:  # once, not for every layer
            self._warned.add((columns, message))
            log.warning(message, columns, group)

    @staticmethod
    def _pieces(
        names: Sequence[str], parts: list[Weight], weight: LinearWeight
    ) -> Iterator[tuple[str, Rows]]:
        """Whose rows, and the rows as `write_rows` takes them: a multiple of 16 unless they are the last."""
        if any(part.shape[0] % 16 for part in parts[:-1]):
            names, parts = [", ".join(names)], [_stacked(parts)]
        for name, part in zip(names, parts, strict=True):
            if not isinstance(part, QuantTensor) or part.scheme == weight.format:
                yield name, part
                continue
            step = max(16, _PIECE_BYTES // (4 * part.shape[1]) // 16 * 16)
            for first in range(0, part.shape[0], step):
                yield name, part[first : first + step].dequantize()

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

    def matrices(
        self, names: Sequence[str], sizes: Sequence[int], columns: int, *, bias: bool = False
    ) -> list[LinearWeight]:
        """Like `WeightLoader.matrices`, without the values."""
        self.expect_matrix(names, sizes, columns, bias=bias)
        nothing = Tensor.empty((0,), DType.uint8, self.device)
        return [LinearWeight(DType.float32, sum(sizes), columns, nothing)]


def _stacked(parts: list[Weight]) -> Weight:
    """The rows of all parts in one array."""
    stored = [part for part in parts if isinstance(part, QuantTensor)]
    if len(stored) == len(parts) and len({part.scheme for part in stored}) == 1:
        return concatenate(stored)
    return np.concatenate([_floats(part) for part in parts])


def _floats(stored: Weight) -> NDArray[Any]:
    return stored.dequantize() if isinstance(stored, QuantTensor) else stored
