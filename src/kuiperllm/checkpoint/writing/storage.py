"""How a tensor lies in a file: which parts it has, one after the other, and how values turn into them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import Weight
from kuiperllm.checkpoint.quantized import ours
from kuiperllm.core.dtype import DType
from kuiperllm.quant import QuantTensor, Scheme
from kuiperllm.quant.ggml import BlockFormat

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of bytes: all of a tensor, or of its codes, or of its scales."""

    suffix: str
    """Added to the tensor's name where parts are tensors of their own."""
    dtype: DType
    """Of its elements, where the file says it."""
    shape: tuple[int, ...]
    nbytes: int


class Storage(ABC):
    """How one tensor lies in a file."""

    kind: DType | Scheme
    """What its values have to be."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For people: `bfloat16`, `Q4_K`, `q4, groups of 32`."""

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Of a tensor of this shape, in the order of the file."""

    @abstractmethod
    def encode(self, values: Weight) -> tuple[Bytes, ...]:
        """The bytes of each part that some rows, which are of this `kind`, make."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape."""
        return sum(part.nbytes for part in self.parts(shape))

    def rows_to_groups(self, values: NDArray[Any]) -> NDArray[Any]:
        """What is rounded as a matrix: the rows, unless groups run on from one row to the next."""
        return values


@dataclass(frozen=True, slots=True)
class PlainStorage(Storage):
    """Floating-point numbers."""

    kind: DType

    @property
    def name(self) -> str:
        """The type's."""
        return str(self.kind)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The numbers."""
        return (Part("", self.kind, shape, math.prod(shape) * self.kind.itemsize),)

    def encode(self, values: Weight) -> tuple[Bytes, ...]:
        """Little-endian, as every machine that this runs on has them."""
        assert not isinstance(values, QuantTensor)
        return (as_bytes(values),)


@dataclass(frozen=True, slots=True)
class GroupStorage(Storage):
    """Our own way of quantizing in safetensors: codes, scales and zero points as tensors, see `ours`."""

    kind: Scheme

    @property
    def name(self) -> str:
        """Bits and groups."""
        return f"{self.kind} with zero points" if self.kind.has_zeros else str(self.kind)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Its tensors."""
        rows, columns = shape
        return tuple(
            Part(part.suffix, part.dtype, part.shape, math.prod(part.shape) * part.dtype.itemsize)
            for part in ours.parts_of(self.kind, rows, columns)
        )

    def encode(self, values: Weight) -> tuple[Bytes, ...]:
        """Of each of its tensors."""
        assert isinstance(values, QuantTensor)
        return tuple(as_bytes(part) for part in ours.encode(values))


@dataclass(frozen=True, slots=True)
class BlockStorage(Storage):
    """Blocks of GGUF."""

    format: BlockFormat

    @property
    def kind(self) -> DType | Scheme:  # type: ignore[override]  # a field elsewhere
        """What the blocks hold."""
        return self.format.kind

    @property
    def name(self) -> str:
        """ggml's."""
        return self.format.name

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The blocks."""
        nbytes = math.prod(shape) // self.format.block_size * self.format.block_bytes
        return (Part("", DType.uint8, shape, nbytes),)

    def encode(self, values: Weight) -> tuple[Bytes, ...]:
        """Whole blocks."""
        return (as_bytes(self.format.pack(values)),)


@dataclass(frozen=True, slots=True)
class FlatInt8Storage(Storage):
    """llama2.c's: the int8 values of a matrix, then the float32 scales of its groups.

    Groups run over the flattened matrix, so they need not divide its rows.
    """

    kind: Scheme

    @property
    def name(self) -> str:
        """Bits and groups."""
        return str(self.kind)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Values and scales."""
        count = math.prod(shape)
        groups = count // self.kind.group_size
        return (
            Part("", DType.int8, shape, count),
            Part("", DType.float32, (groups,), groups * DType.float32.itemsize),
        )

    def rows_to_groups(self, values: NDArray[Any]) -> NDArray[Any]:
        """A row for each group, where rows are not made of whole groups."""
        return (
            values
            if values.shape[1] % self.kind.group_size == 0
            else values.reshape(-1, self.kind.group_size)
        )

    def encode(self, values: Weight) -> tuple[Bytes, ...]:
        """Values in two's complement."""
        assert isinstance(values, QuantTensor)
        return as_bytes(values.codes.unpack() ^ np.uint8(0x80)), as_bytes(values.scales)


def as_bytes(values: NDArray[Any]) -> Bytes:
    """The bytes of an array, in the order of its elements."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
