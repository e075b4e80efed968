"""The tensor: a strided view on a buffer, with everything that moves no value through arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kuiperllm.core import layout
from kuiperllm.core.device import Device
from kuiperllm.core.dtype import DType
from kuiperllm.core.layout import Index, Shape
from kuiperllm.core.memory import Buffer
from kuiperllm.errors import DTypeError, ShapeError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


_ITEMSIZE = {dtype: dtype.itemsize for dtype in DType}


class Tensor:
    """Elements of one type in memory of one device, seen through a shape and strides.

    Slicing, transposing and reshaping give views on the same memory; nothing here copies unless its name says
    so. Tensors compare by identity. The constructor lays a view on a buffer; use `empty`, `zeros`, `full`,
    `from_numpy` and `from_dlpack` to make tensors from scratch.

    Args:
        buffer: the memory.
        dtype: the type of the elements.
        shape: the size of each axis; () is a single element.
        strides: elements from one entry to the next along each axis, negative or 0 allowed (default: the
            elements lie one after the other, the last axis fastest).
        offset: where in the buffer the first element lies, in bytes.

    Raises:
        ShapeError: the shape is invalid, or elements lie outside the buffer.
    """

    __slots__ = ("__weakref__", "_contiguous", "buffer", "dtype", "offset", "shape", "strides")

    buffer: Buffer
    dtype: DType
    shape: Shape
    strides: Shape
    offset: int
    _contiguous: bool | None

    def __init__(
        self,
        buffer: Buffer,
        dtype: DType | str,
        shape: int | Sequence[int],
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ) -> None:
        self.dtype = DType.of(dtype)
        itemsize = _ITEMSIZE[self.dtype]
        self.buffer = buffer
        self.shape = layout.checked_shape(shape, itemsize)
        self.strides = layout.contiguous_strides(self.shape) if strides is None else tuple(strides)
        self.offset = offset
        if offset % itemsize:
            raise ShapeError(
                f"shape {list(self.shape)}: offset {offset} is not a multiple of {itemsize} bytes"
            )
        self._contiguous = None
        if len(self.strides) != len(self.shape):
            raise ShapeError(f"shape {list(self.shape)} does not go with strides {list(self.strides)}")
        first, last = layout.extent(self.shape, self.strides)
        if offset < 0 or offset + first * itemsize < 0 or offset + (last + 1) * itemsize > buffer.nbytes:
            raise ShapeError(
                f"shape {list(self.shape)}, strides {list(self.strides)}, {self.dtype}, offset {offset}: "
                f"reaches outside a buffer of {buffer.nbytes} bytes"
            )

    # --- making tensors -----------------------------------------------------------------------------------

    @classmethod
    def empty(
        cls, shape: int | Sequence[int], dtype: DType | str = DType.float32, device: Device | str = "cpu"
    ) -> Tensor:
        """A tensor whose values are whatever the memory held.

        Raises:
            ShapeError: a size is negative or no integer, or there are too many elements.
            OutOfMemoryError: the device has not enough memory left.
        """
        if type(dtype) is not DType:
            dtype = DType.of(dtype)
        if type(device) is not Device:
            device = Device(device)
        itemsize = _ITEMSIZE[dtype]
        sizes = layout.checked_shape(shape, itemsize)
        buffer = device.allocator.allocate(math.prod(sizes) * itemsize)
        return _view(buffer, dtype, sizes, layout.contiguous_strides(sizes), 0, True)

    @classmethod
    def zeros(
        cls, shape: int | Sequence[int], dtype: DType | str = DType.float32, device: Device | str = "cpu"
    ) -> Tensor:
        """A tensor of zeros. Raises like `empty`."""
        tensor = cls.empty(shape, dtype, device)
        tensor.buffer.fill(0)
        return tensor

    @classmethod
    def full(
        cls,
        shape: int | Sequence[int],
        value: float,
        dtype: DType | str = DType.float32,
        device: Device | str = "cpu",
    ) -> Tensor:
        """A tensor with `value` everywhere. Raises like `empty`.

        Raises:
            DTypeError: the type cannot hold the value.
        """
        tensor = cls.empty(shape, dtype, device)
        try:
            with np.errstate(over="raise", invalid="raise"):
                one = np.full((), value, dtype=tensor.dtype.numpy)
            exact = tensor.dtype.is_float or one == value
        except (ArithmeticError, ValueError, TypeError):
            exact = False
        if not exact:
            raise DTypeError(f"{tensor.dtype} cannot hold the value {value!r}")
        return tensor.copy_(cls.from_numpy(one).to(tensor.device).expand(tensor.shape))

    @classmethod
    def from_numpy(cls, array: Array, *, copy: bool = False) -> Tensor:
        """A tensor on the host with the values of `array`.

        It shares the array's memory if `copy` is false and that memory is aligned, in the machine's byte
        order and strided in whole elements; otherwise the values are copied. A read-only array gives a
        read-only tensor unless it is copied.

        Raises:
            DTypeError: the array's type is not one of `DType`.
        """
        array = np.asarray(array)
        dtype = DType.of(array.dtype)
        shareable = (
            array.flags.aligned
            and array.dtype.isnative
            and not any(stride % array.itemsize for stride in array.strides)
        )
        if copy or not shareable:
            tensor = cls.empty(array.shape, dtype)
            np.copyto(tensor.numpy(), array, casting="equiv")
            return tensor
        strides = tuple(stride // array.itemsize for stride in array.strides)
        first, last = layout.extent(array.shape, strides)
        address, nbytes = array.ctypes.data + first * array.itemsize, (last + 1 - first) * array.itemsize
        buffer = Buffer.wrap(array, address, nbytes, Device("cpu"), writable=array.flags.writeable)
        return _view(buffer, dtype, array.shape, strides, -first * array.itemsize)

    @classmethod
    def from_dlpack(cls, obj: Any) -> Tensor:
        """A tensor on the memory of another library's tensor, which is kept alive; nothing is copied.

        Raises:
            DLPackError: the object does not support DLPack, or not a version that is known here.
            DTypeError: its type is not one of `DType`.
            DeviceError: it lives on a device that is not known here.
        """
        from kuiperllm.core import dlpack

        return dlpack.from_object(obj)

    # --- what it is ---------------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        """Where the memory lives."""
        return self.buffer.device

    @property
    def address(self) -> int:
        """The address of the first element, for kernels.

        Raises:
            MemoryLifetimeError: the memory was released, or its owner closed it.
        """
        return self.buffer.address + self.offset

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    size = numel

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other, the last axis fastest."""
        if self._contiguous is None:
            self._contiguous = layout.is_contiguous(self.shape, self.strides)
        return self._contiguous

    @property
    def writable(self) -> bool:
        """Whether the memory may be written to."""
        return self.buffer.writable

    # --- views --------------------------------------------------------------------------------------------

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Tensor:
        """The view that NumPy's basic indexing gives: integers, slices, `...` and None.

        Raises:
            ShapeError: an index is out of range or of another kind, or there are too many.
        """
        first, shape, strides = layout.indexed(self.shape, self.strides, index)
        return self._with(shape, strides, first)

    def __len__(self) -> int:
        if not self.shape:
            raise ShapeError("a tensor of shape [] has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def reshape(self, *shape: int | Sequence[int]) -> Tensor:
        """A view of the same elements in another shape; one size may be -1: what is left.

        Raises:
            ShapeError: the number of elements differs, or the elements lie so that only a copy could have
                that shape (call `contiguous()` first).
        """
        wanted = layout.infer_size(self.shape, _flat(shape))
        strides = layout.reshaped_strides(self.shape, self.strides, wanted)
        if strides is None:
            raise ShapeError(
                f"shape {list(self.shape)}, strides {list(self.strides)}: no view has shape {list(wanted)}; "
                "call contiguous() first"
            )
        return self._with(wanted, strides)

    def permute(self, *axes: int | Sequence[int]) -> Tensor:
        """A view whose axis `i` is this tensor's axis `axes[i]`.

        Raises:
            ShapeError: the axes are not each of this tensor's, once.
        """
        order = [
            layout.checked_axis(axis, self.ndim, self.shape) for axis in layout.integers(_flat(axes), "axes")
        ]
        if sorted(order) != list(range(self.ndim)):
            raise ShapeError(f"shape {list(self.shape)}: {list(_flat(axes))} is no order of its axes")
        return self._with(tuple(self.shape[a] for a in order), tuple(self.strides[a] for a in order))

    def transpose(self, a: int, b: int) -> Tensor:
        """A view with axes `a` and `b` exchanged.

        Raises:
            ShapeError: there is no such axis.
        """
        order = list(range(self.ndim))
        a, b = (layout.checked_axis(axis, self.ndim, self.shape) for axis in (a, b))
        order[a], order[b] = b, a
        return self.permute(order)

    @property
    def T(self) -> Tensor:
        """A view with the axes in reverse order."""
        return self._with(self.shape[::-1], self.strides[::-1])

    def unsqueeze(self, axis: int) -> Tensor:
        """A view with an axis of size 1 inserted, so that it is axis `axis` of the result.

        Raises:
            ShapeError: there is no such place.
        """
        axis = layout.checked_axis(axis, self.ndim + 1, self.shape)
        shape, strides = self.shape, self.strides
        return self._with((*shape[:axis], 1, *shape[axis:]), (*strides[:axis], 0, *strides[axis:]))

    def squeeze(self, axis: int | None = None) -> Tensor:
        """A view without axis `axis`, which has size 1, or without any axis of size 1.

        Raises:
            ShapeError: there is no such axis, or its size is not 1.
        """
        if axis is None:
            gone = {i for i, size in enumerate(self.shape) if size == 1}
        else:
            gone = {layout.checked_axis(axis, self.ndim, self.shape)}
            if self.shape[axis] != 1:
                raise ShapeError(f"shape {list(self.shape)}: axis {axis} has size {self.shape[axis]}, not 1")
        kept = [i for i in range(self.ndim) if i not in gone]
        return self._with(tuple(self.shape[i] for i in kept), tuple(self.strides[i] for i in kept))

    def expand(self, *shape: int | Sequence[int]) -> Tensor:
        """A view that repeats axes of size 1, and new leading axes, without copying (NumPy's broadcasting).

        Raises:
            ShapeError: the shapes do not match.
        """
        wanted = layout.checked_shape(_flat(shape), self.itemsize)
        new = len(wanted) - self.ndim
        pairs = list(zip(self.shape, wanted[max(new, 0) :], strict=False))
        if new < 0 or any(size not in (1, want) for size, want in pairs):
            raise ShapeError(f"shape {list(self.shape)}: cannot expand to {list(wanted)}")
        strides = [s if size == want else 0 for s, (size, want) in zip(self.strides, pairs, strict=True)]
        return self._with(wanted, (0,) * new + tuple(strides))

    def split(self, sizes: int | Sequence[int], axis: int = 0) -> tuple[Tensor, ...]:
        """Views on consecutive pieces along `axis`: of these sizes, or all of one size with a smaller rest.

        Raises:
            ShapeError: there is no such axis, or the sizes do not add up to it.
        """
        axis = layout.checked_axis(axis, self.ndim, self.shape)
        total = self.shape[axis]
        if isinstance(sizes, int):
            if sizes <= 0:
                raise ShapeError(f"shape {list(self.shape)}: cannot split into pieces of {sizes}")
            sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
        sizes = layout.integers(sizes, "sizes")
        if any(size < 0 for size in sizes) or sum(sizes) != total:
            raise ShapeError(
                f"shape {list(self.shape)}: {list(sizes)} do not add up to {total}, the size of axis {axis}"
            )
        pieces, start = [], 0
        for size in sizes:
            shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
            pieces.append(self._with(shape, self.strides, start * self.strides[axis]))
            start += size
        return tuple(pieces)

    def _with(self, shape: Shape, strides: Shape, first: int = 0) -> Tensor:
        # A view without elements may begin behind the end of the buffer: it stays where this tensor is.
        offset = self.offset if 0 in shape else self.offset + first * _ITEMSIZE[self.dtype]
        return _view(self.buffer, self.dtype, shape, strides, offset)

    # --- copies -------------------------------------------------------------------------------------------

    def contiguous(self) -> Tensor:
        """This tensor if its elements lie one after the other, else a copy whose elements do."""
        return self if self.is_contiguous else self.clone()

    def clone(self) -> Tensor:
        """A contiguous copy on the same device.

        Raises:
            OutOfMemoryError: the device has not enough memory left.
        """
        return Tensor.empty(self.shape, self.dtype, self.device).copy_(self)

    def to(self, device: Device | str) -> Tensor:
        """This tensor if it lives on `device`, else a contiguous copy there.

        Raises:
            DeviceError: there is no such device.
            OutOfMemoryError: the device has not enough memory left.
        """
        device = Device(device)
        if device is self.device:
            return self
        return Tensor.empty(self.shape, self.dtype, device).copy_(self)

    def copy_(self, src: Tensor) -> Tensor:
        """Copy the values of `src`, which may live on another device or overlap this tensor; returns self.

        Raises:
            ShapeError: the shapes differ.
            DTypeError: the types differ.
            UsageError: this tensor is read-only.
        """
        if src.shape != self.shape:
            raise ShapeError(f"shape {list(self.shape)}: cannot take the values of shape {list(src.shape)}")
        if src.dtype is not self.dtype:
            raise DTypeError(f"cannot copy {src.dtype} into a tensor of {self.dtype}; convert it first")
        self._require_writable()
        if src.device is not self.device:
            src = src.contiguous()
            if not self.is_contiguous:
                src = src.to(self.device)
        if src.is_contiguous and self.is_contiguous:
            self.buffer.copy_from(src.buffer, self.nbytes, self.offset, src.offset)
        elif self.numel:
            self.device.backend.copy_strided(
                self.address, self.strides, src.address, src.strides, self.shape, self.itemsize
            )
        return self

    def _require_writable(self) -> None:
        if not self.buffer.writable:
            raise UsageError(f"a tensor of shape {list(self.shape)} is read-only; clone() it first")

    # --- to Python and NumPy ------------------------------------------------------------------------------

    def numpy(self) -> Array:
        """A NumPy array that shares the memory and keeps it alive; from another device, a copy.

        bfloat16 comes as `ml_dtypes.bfloat16`.

        Raises:
            MemoryLifetimeError: the memory was released, or its owner closed it.
        """
        if not self.device.is_host:
            return self.to("cpu").numpy()
        dtype = self.dtype.numpy
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        return np.asarray(_HostArray(self)).view(dtype)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack__(
        self,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule on this memory (Python array API standard).

        Raises:
            DLPackError: a copy is needed but forbidden, or the tensor is read-only and the consumer too old
                to know about that.
        """
        from kuiperllm.core import dlpack

        return dlpack.to_capsule(self, stream, max_version, dl_device, copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        from kuiperllm.core import dlpack

        return dlpack.device_of(self)

    def item(self) -> int | float:
        """The only element as a Python number.

        Raises:
            ShapeError: there is not exactly one.
        """
        if self.numel != 1:
            raise ShapeError(f"shape {list(self.shape)}: item() needs exactly one element")
        value: int | float = self.numpy().item()
        return value

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""
        return self.numpy().tolist()

    def __repr__(self) -> str:
        head = f"Tensor(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"
        if not self.buffer.is_alive:
            return f"{head} released"
        return f"{head}\n{np.array2string(self.numpy(), precision=4, threshold=64, max_line_width=100)}"


def _view(
    buffer: Buffer, dtype: DType, shape: Shape, strides: Shape, offset: int, contiguous: bool | None = None
) -> Tensor:
    """A tensor from parts known to be right: views are made often, and checking costs more than making."""
    tensor = Tensor.__new__(Tensor)
    tensor.buffer = buffer
    tensor.dtype = dtype
    tensor.shape = shape
    tensor.strides = strides
    tensor.offset = offset
    tensor._contiguous = contiguous
    return tensor


def _flat(sizes: tuple[int | Sequence[int], ...]) -> Sequence[int]:
    """The integers of `f(1, 2)` and of `f([1, 2])` alike."""
    if len(sizes) == 1 and isinstance(sizes[0], Sequence):
        return sizes[0]
    return sizes  # type: ignore[return-value]


class _HostArray:
    """Shows a tensor's memory to NumPy and keeps its owner (NumPy's array interface, version 3).

    The elements go as raw bytes, because the interface has no code for bfloat16.
    """

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, tensor: Tensor) -> None:
        itemsize = tensor.itemsize
        self._owner = tensor.buffer.owner()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{itemsize}",
            "data": (tensor.address, not tensor.writable),
            "shape": tensor.shape,
            "strides": tuple(stride * itemsize for stride in tensor.strides),
        }
