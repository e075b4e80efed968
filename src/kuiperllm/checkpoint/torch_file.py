"""The container of `torch.save`, read without torch: a ZIP archive of a pickle and the bytes of its storages.

Source: torch/serialization.py and caffe2/serialize/inline_container.h of PyTorch (files since version 1.6).
`<name>/data.pkl` is the object, in which every tensor is a call of `torch._utils._rebuild_tensor_v2` on a
storage, and a storage is the persistent id ("storage", type, key, device, elements); its bytes are the entry
`<name>/data/<key>`. Several tensors may look at one storage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.mapping import MappedFile, aligned
from kuiperllm.checkpoint.pickled import MAX_PICKLE_BYTES, Constructor, RefusedError, shown, unpickle
from kuiperllm.checkpoint.stored_zip import StoredEntry, StoredZip
from kuiperllm.errors import CheckpointError, UnsupportedError

MAX_DIMENSIONS = 8
_OBJECT = "/data.pkl"

_STORAGE_TYPES: dict[str, np.dtype[Any]] = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A stretch of the file: `count` elements from byte `offset` on."""

    dtype: np.dtype[Any]
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A view of a storage; offset and strides are in elements. It has been checked to lie within."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> tuple[int, int]:
        """Offset in the file, and bytes up to the end of the last element."""
        elements = 1 + _last_element(self.shape, self.strides) if math.prod(self.shape) else 0
        itemsize = self.dtype.itemsize
        return self.storage.offset + self.offset * itemsize, elements * itemsize


class TorchFile:
    """An opened file of `torch.save`. Its pickle has been read, its tensors have not.

    Raises:
        CheckpointError: the file is truncated or corrupt, or a tensor does not lie within its storage.
        UnsupportedError: it asks for anything but tensors and plain data, or is big-endian or compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = MappedFile(path)
        self._zip = StoredZip(self.file)
        pickle = self._find_pickle()
        self._prefix = pickle.name.removesuffix(_OBJECT)
        self._check_byte_order()
        self._storages: dict[str, Storage] = {}
        if pickle.nbytes > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: has a pickle of {pickle.nbytes} bytes; at most {MAX_PICKLE_BYTES} are read"
            )
        try:
            self.root: Any = unpickle(self._zip.read(pickle), _find_global, self._storage)
            """What was saved: plain data with `TorchTensor` in the place of tensors."""
        except RefusedError as error:
            raise UnsupportedError(f"{path}: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def array(self, tensor: TorchTensor) -> NDArray[Any]:
        """A read-only view of a tensor; a copy where it is not aligned.

        Raises:
            CheckpointError: the file is closed.
        """
        raw = aligned(self.file.raw(*tensor.extent), tensor.dtype.alignment)
        strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
        return np.ndarray(tensor.shape, tensor.dtype, raw, 0, strides)

    def bytes_of(self, tensor: TorchTensor) -> NDArray[np.uint8]:
        """A read-only view of a tensor's bytes, one axis more than the tensor has; never a copy.

        Raises:
            CheckpointError: the file is closed.
        """
        itemsize = tensor.dtype.itemsize
        strides = [*(stride * itemsize for stride in tensor.strides), 1]
        raw = self.file.raw(*tensor.extent)
        return np.ndarray((*tensor.shape, itemsize), np.uint8, raw, 0, strides)

    def release(self, tensor: TorchTensor) -> None:
        """Let the system drop a tensor's pages; they are read again when touched."""
        self.file.release(*tensor.extent)

    def close(self) -> None:
        """Give up the file; reading tensors is an error from here on."""
        self.file.close()

    def _find_pickle(self) -> StoredEntry:
        found = [entry for name, entry in self._zip.entries.items() if name.endswith(_OBJECT)]
        if len(found) != 1:
            raise CheckpointError(
                f"{self.path}: is no file of torch.save: {len(found)} of its archive's "
                f"{len(self._zip.entries)} entries end in {_OBJECT}"
            )
        return found[0]

    def _check_byte_order(self) -> None:
        entry = self._zip.entries.get(f"{self._prefix}/byteorder")
        order = b"little" if entry is None else self._zip.read(entry)[:20]
        if order != b"little":
            raise UnsupportedError(
                f"{self.path}: has the byte order {brief(order)}; supported: little endian"
            )

    def _storage(self, identity: Any) -> Storage:
        """The storage that a persistent id names, after checking that the archive holds it in full."""
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise ValueError("its pickle has a persistent id that is not of a storage")
        _, dtype, key, _, count = identity
        if not isinstance(dtype, np.dtype):
            raise ValueError(f"a storage has {shown(dtype)} as its type")
        if type(key) is not str or type(count) is not int:
            raise ValueError(f"a storage has the key {shown(key)} and {shown(count)} elements")
        entry = self._zip.entries.get(f"{self._prefix}/data/{key}")
        if entry is None:
            raise ValueError(f"there is no storage {brief(key)} in the archive")
        if count * dtype.itemsize != entry.nbytes:
            raise ValueError(
                f"storage {brief(key)} claims {brief(count)} elements of {dtype}, but has {entry.nbytes} "
                "bytes"
            )
        storage = self._storages.setdefault(key, Storage(dtype, entry.offset, count))
        if storage.dtype != dtype:
            raise ValueError(f"storage {brief(key)} is {storage.dtype} in one place and {dtype} in another")
        return storage


# --- what a pickle may name -------------------------------------------------------------------------------


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("its pickle makes an OrderedDict with arguments")
    return {}


def _rebuild_tensor(arguments: tuple[Any, ...]) -> TorchTensor:
    """`torch._utils._rebuild_tensor` and its second version.

    Arguments are storage, offset, size and stride, then in the second version requires_grad and hooks, and in
    newer files metadata: whether the values are to be conjugated or negated.
    """
    if len(arguments) not in (4, 6, 7):
        raise ValueError(f"a tensor is made of {len(arguments)} arguments; torch.save writes 4, 6 or 7")
    if len(arguments) == 7 and arguments[6]:
        raise ValueError("a tensor is marked as conjugated or negated, which no weight is")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor has {shown(storage)} as its storage")
    if not _is_count(offset) or not _are_counts(shape) or not _are_counts(strides):
        raise ValueError("a tensor's offset, size or strides are not whole numbers from 0 up")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    elements = math.prod(shape)
    # Elements may overlap, as in torch's expanded tensors, but not so that a copy takes more than the file.
    largest = math.prod(size for size in shape if size)
    if largest > max(1, storage.count) or (
        elements and offset + _last_element(shape, strides) >= storage.count
    ):
        raise ValueError(
            f"a tensor of shape {brief(list(shape))}, strides {brief(list(strides))} and offset "
            f"{brief(offset)} does not lie within its storage of {storage.count} elements"
        )
    # Strides along which nobody moves may be anything.
    used = tuple(stride if elements and size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return TorchTensor(storage, offset, shape, used)


def _rebuild_parameter(arguments: tuple[Any, ...]) -> TorchTensor:
    if len(arguments) != 3 or not isinstance(arguments[0], TorchTensor):
        raise ValueError("a parameter is not made of a tensor")
    return arguments[0]


_CONSTRUCTORS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
_GLOBALS: dict[str, object] = {
    **{name: Constructor(name, make) for name, make in _CONSTRUCTORS.items()},
    **{f"torch.{name}": dtype for name, dtype in _STORAGE_TYPES.items()},
}


def _find_global(module: str, name: str) -> object | None:
    return _GLOBALS.get(f"{module}.{name}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_counts(values: object) -> bool:
    return type(values) is tuple and len(values) <= MAX_DIMENSIONS and all(map(_is_count, values))


def _last_element(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
