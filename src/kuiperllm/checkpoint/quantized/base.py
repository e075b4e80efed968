"""What the ways of quantizing safetensors have in common: matrices that are made of several tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import TensorInfo, brief
from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, KuiperError, UnsupportedError
from kuiperllm.quant import QuantTensor, Scheme

Arrays = Mapping[str, NDArray[Any]]
"""The tensors of a module, by what follows its name."""

GROUP_SIZES = (128, 64, 32)
"""Of groups that stand for a whole row, a block or a whole tensor with one scale: kernels want such."""
SCALE_TYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix that a checkpoint stores in several tensors."""

    info: TensorInfo
    """As of one tensor, `<module>.weight`; with the bytes of all."""
    parts: Mapping[str, str]
    """The names of the tensors that it is made of, by what follows the module's name."""
    assemble: Callable[[Arrays], QuantTensor]
    """From these tensors to the matrix."""

    def load(self, arrays: Arrays, where: str) -> QuantTensor:
        """The matrix of `parts`.

        Raises:
            CheckpointError: they do not fit together.
        """
        try:
            return self.assemble(arrays)
        except KuiperError as error:
            raise type(error)(f"{where}: tensor {self.info.name}: {error}") from None


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """The tensors of a part of the network, such as `model.layers.0.mlp.up_proj`."""

    name: str
    tensors: Mapping[str, TensorInfo]
    """By what follows the name, such as `weight_scale`."""
    where: str
    """The file, for messages."""

    def expect(self, suffix: str, dtypes: Collection[str], dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that must exist, have one of these types, and not be empty.

        Raises:
            CheckpointError: it is missing or has another shape.
            UnsupportedError: it has another type.
        """
        info = self.tensors.get(suffix)
        if info is None:
            raise CheckpointError(f"{self.where}: tensor {brief(self.name + '.' + suffix)} is missing")
        if info.dtype not in dtypes:
            raise UnsupportedError(
                f"{self.where}: tensor {brief(info.name)} is {info.dtype}, which is not supported here; "
                f"supported: {', '.join(dtypes)}"
            )
        if len(info.shape) != dimensions or 0 in info.shape:
            raise CheckpointError(
                f"{self.where}: tensor {brief(info.name)} has the shape {list(info.shape)}; "
                f"{dimensions} dimensions are expected, none of them 0"
            )
        return info.shape

    def expect_shape(self, suffix: str, dtypes: Collection[str], shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is missing, or of another type or shape.

        Raises:
            CheckpointError: it is missing or has another shape.
            UnsupportedError: it has another type.
        """
        found = self.expect(suffix, dtypes, len(shape))
        if found != shape:
            raise CheckpointError(
                f"{self.where}: tensor {brief(self.name + '.' + suffix)} has the shape {list(found)}, "
                f"but the codes beside it ask for {list(shape)}"
            )

    def groups(self, columns: int, count: int, stated: int | None, suffix: str) -> int:
        """The size of `count` groups that rows are made of.

        Args:
            columns: of the matrix.
            count: groups of a row.
            stated: what the configuration says; None if nothing, -1 for whole rows.
            suffix: of the tensor with the scales.

        Raises:
            CheckpointError: groups do not divide the rows, or the configuration says otherwise.
        """
        size = columns // count
        if size * count != columns or (stated is not None and size != (columns if stated == -1 else stated)):
            said = "" if stated is None else f", in groups of {stated} as the configuration says"
            raise CheckpointError(
                f"{self.where}: tensor {brief(self.name + '.' + suffix)} has {count} scales for each row of "
                f"{columns} weights{said}, which does not fit"
            )
        return size

    def matrix(
        self,
        dtype: str,
        shape: tuple[int, int],
        scheme: Scheme,
        parts: Collection[str],
        assemble: Callable[[Arrays], QuantTensor],
    ) -> QuantizedMatrix:
        """The matrix that some tensors of this module make."""
        infos = [self.tensors[suffix] for suffix in parts]
        nbytes = sum(info.nbytes for info in infos)
        return QuantizedMatrix(
            TensorInfo(f"{self.name}.weight", dtype, shape, nbytes, scheme),
            {suffix: self.tensors[suffix].name for suffix in parts},
            assemble,
        )


class Method(ABC):
    """A way of quantizing, as config.json states it.

    Args:
        config: the contents of `quantization_config`.
        where: the file, for messages.

    Raises:
        ConfigError: a field has a value that makes no sense.
        UnsupportedError: it is a variant that is not supported.
    """

    unused: frozenset[str] = frozenset()
    """What tensors beside weights that are not needed end in, such as scales of activations."""

    @abstractmethod
    def __init__(self, config: Mapping[str, Any], where: str) -> None: ...

    @abstractmethod
    def matrix(self, module: Module) -> QuantizedMatrix | None:
        """The weights of a module; None if they are not quantized.

        Raises:
            CheckpointError: tensors are missing or do not fit together.
            UnsupportedError: a data type is not supported.
        """


def refuse(where: str, method: str, what: str, supported: str) -> UnsupportedError:
    """The error about a variant of a method."""
    return UnsupportedError(f"{where}: {method} with {what} is not supported; supported: {supported}")


def spread_size(columns: int, width: int | None = None) -> int:
    """The size of groups that repeat one scale along `width` columns; None: along whole rows."""
    width = columns if width is None else width
    fitting = (size for size in GROUP_SIZES if columns % size == 0 and width % size == 0)
    return next(fitting, math.gcd(columns, width))


def stored_scale_type(dtype: str) -> DType:
    """The type that scales are kept in: bfloat16 has no place in a scheme, and float32 holds it exactly."""
    return DType.float16 if dtype == "float16" else DType.float32


def repeated(scales: NDArray[Any], times: int, dtype: DType) -> NDArray[Any]:
    """Scales [N, groups] in another type, each standing for so many smaller groups."""
    return np.repeat(scales.astype(dtype.numpy), times, axis=1)


def column_order(groups: NDArray[Any] | None, size: int, count: int) -> NDArray[np.intp] | None:
    """The order of columns in which groups are neighbours, from the group of each column; None: as they are.

    Raises:
        CheckpointError: a group does not exist.
        UnsupportedError: groups have different sizes.
    """
    if groups is None:
        return None
    if int(groups.min()) < 0 or int(groups.max()) >= count:
        raise CheckpointError(
            f"g_idx has groups from {groups.min()} to {groups.max()}, of {count} that there are"
        )
    members = np.bincount(groups, minlength=count)
    if (members != size).any():
        raise UnsupportedError(
            f"its groups have from {members.min()} to {members.max()} columns; groups of {size} are supported"
        )
    order = np.argsort(groups, kind="stable")
    return None if np.array_equal(order, np.arange(len(order))) else order
