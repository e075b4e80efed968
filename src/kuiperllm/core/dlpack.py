"""DLPack: exchange tensors with NumPy, PyTorch and others without copying.

The structures are those of dlpack.h, version 1.0, in the old form (`DLManagedTensor`) and the versioned one;
the protocol around them is that of the Python array API standard. Whoever makes a structure frees it through
its deleter, which the consumer calls once. A capsule that was consumed is renamed to "used_...".
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any, ClassVar

from kuiperllm.core import layout
from kuiperllm.core.device import Device
from kuiperllm.core.dlpack_callbacks import callbacks
from kuiperllm.core.dtype import DType
from kuiperllm.core.memory import Buffer
from kuiperllm.core.tensor import Tensor
from kuiperllm.errors import DeviceError, DLPackError, DTypeError

_MAJOR, _MINOR = 1, 0
_FLAG_READ_ONLY, _FLAG_IS_COPIED = 1, 2

_CPU, _CUDA, _CUDA_HOST = 1, 2, 3
_DEVICE_TYPES = {"cpu": _CPU, "cuda": _CUDA}

_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4
_TYPE_CODES = {
    DType.float32: (_FLOAT, 32),
    DType.float16: (_FLOAT, 16),
    DType.bfloat16: (_BFLOAT, 16),
    DType.int8: (_INT, 8),
    DType.uint8: (_UINT, 8),
    DType.int32: (_INT, 32),
    DType.int64: (_INT, 64),
}
_DTYPES = {code: dtype for dtype, code in _TYPE_CODES.items()}

_Deleter = ctypes.PYFUNCTYPE(None, c_void_p)


class _DLDevice(ctypes.Structure):
    _fields_: ClassVar = [("device_type", c_int32), ("device_id", c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_: ClassVar = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("device", _DLDevice),
        ("ndim", c_int32),
        ("dtype", _DLDataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_: ClassVar = [("dl_tensor", _DLTensor), ("manager_ctx", c_void_p), ("deleter", c_void_p)]


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("dl_tensor", _DLTensor),
    ]


_NAME, _NAME_VERSIONED = b"dltensor", b"dltensor_versioned"
_STRUCTURES: dict[bytes, type[_DLManagedTensor] | type[_DLManagedTensorVersioned]] = {
    _NAME: _DLManagedTensor,
    _NAME_VERSIONED: _DLManagedTensorVersioned,
}

# A capsule points to its name, so the names must outlive every capsule.
_NAMES = {name: ctypes.create_string_buffer(name) for name in _STRUCTURES}
_USED_NAMES = {name: ctypes.create_string_buffer(b"used_" + name) for name in _STRUCTURES}
ctypes.pythonapi.Py_IncRef(ctypes.py_object((_NAMES, _USED_NAMES)))

_capsule_new = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_void_p, c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object, c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule_is_valid = ctypes.PYFUNCTYPE(c_int, ctypes.py_object, c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_set_name = ctypes.PYFUNCTYPE(c_int, ctypes.py_object, c_void_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)


# --- handing out ------------------------------------------------------------------------------------------


class _Export:
    """What a managed tensor refers to: its structures, and the owner of the memory."""

    __slots__ = ("managed", "owner", "shape", "strides")

    def __init__(self, tensor: Tensor, name: bytes, flags: int) -> None:
        ints = c_int64 * max(tensor.ndim, 1)
        self.owner = tensor.buffer.owner()
        self.shape, self.strides = ints(*tensor.shape), ints(*tensor.strides)
        self.managed = _STRUCTURES[name]()
        view = self.managed.dl_tensor
        view.data = tensor.address if tensor.numel else None
        view.device.device_type, view.device.device_id = device_of(tensor)
        view.ndim = tensor.ndim
        view.dtype.code, view.dtype.bits = _TYPE_CODES[tensor.dtype]
        view.dtype.lanes = 1
        view.shape = ctypes.cast(self.shape, POINTER(c_int64))
        view.strides = ctypes.cast(self.strides, POINTER(c_int64))
        self.managed.manager_ctx = id(self)
        if isinstance(self.managed, _DLManagedTensorVersioned):
            self.managed.major, self.managed.minor, self.managed.flags = _MAJOR, _MINOR, flags


def device_of(tensor: Tensor) -> tuple[int, int]:
    """DLPack's type and index of the tensor's device."""
    return _DEVICE_TYPES[tensor.device.type], tensor.device.index


def to_capsule(
    tensor: Tensor,
    stream: int | None,
    max_version: tuple[int, int] | None,
    dl_device: tuple[int, int] | None,
    copy: bool | None,
) -> object:
    """A capsule that hands the tensor's memory to one consumer; see `Tensor.__dlpack__`."""
    if dl_device is not None and tuple(dl_device) != device_of(tensor):
        if copy is False:
            raise DLPackError(f"a tensor on {tensor.device} cannot go to another device without a copy")
        tensor, copy = tensor.to(_device_named(*dl_device)), None
        flags = _FLAG_IS_COPIED
    elif copy:
        tensor, flags = tensor.clone(), _FLAG_IS_COPIED
    else:
        flags = 0 if tensor.writable else _FLAG_READ_ONLY
    name = _NAME_VERSIONED if max_version is not None and max_version[0] >= _MAJOR else _NAME
    if name is _NAME and flags & _FLAG_READ_ONLY:
        raise DLPackError("a read-only tensor cannot go to a library that knows only DLPack 0; clone() it")
    if stream != -1 and (stream is None or stream != tensor.device.backend.stream_handle):
        tensor.device.synchronize()

    export = _Export(tensor, name, flags)
    functions = callbacks(name, _STRUCTURES[name].manager_ctx.offset)
    export.managed.deleter = functions.deleter
    capsule: object = _capsule_new(
        ctypes.addressof(export.managed), ctypes.addressof(_NAMES[name]), functions.destructor
    )
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(export))  # for manager_ctx; the deleter drops it
    return capsule


# --- taking over ------------------------------------------------------------------------------------------


class _Import:
    """Another library's managed tensor: freed, once, when nothing refers to it any more."""

    __slots__ = ("address", "delete")

    def __init__(self, address: int, deleter: int | None) -> None:
        self.address = address
        self.delete = _Deleter(deleter) if deleter else None

    def __del__(self) -> None:
        if self.delete is not None:
            self.delete(self.address)


def from_object(obj: Any) -> Tensor:
    """A tensor on the memory of any object with `__dlpack__`; see `Tensor.from_dlpack`."""
    if not hasattr(obj, "__dlpack__") or not hasattr(obj, "__dlpack_device__"):
        raise DLPackError(f"an object of type {type(obj).__name__} does not support DLPack")
    device = _device_named(*obj.__dlpack_device__())
    options: dict[str, Any] = {}
    if device.backend.stream_handle is not None:
        options["stream"] = device.backend.stream_handle
    try:
        capsule = obj.__dlpack__(max_version=(_MAJOR, _MINOR), **options)
    except TypeError:
        # A producer from before DLPack 1 does not know that argument.
        capsule = obj.__dlpack__(**options)

    name = next((n for n in _STRUCTURES if _capsule_is_valid(capsule, n)), None)
    if name is None:
        raise DLPackError("not a DLPack capsule, or one that was consumed before")
    address = _capsule_pointer(capsule, name)
    managed = _STRUCTURES[name].from_address(address)
    writable = True
    if isinstance(managed, _DLManagedTensorVersioned):
        if managed.major != _MAJOR:
            raise DLPackError(f"DLPack {managed.major}.{managed.minor} is not supported; supported: 1.x")
        writable = not managed.flags & _FLAG_READ_ONLY
    view = managed.dl_tensor
    dtype, shape, strides = _dtype_of(view), *_layout_of(view)
    _capsule_set_name(capsule, ctypes.addressof(_USED_NAMES[name]))
    owner = _Import(address, managed.deleter)

    first, last = layout.extent(shape, strides)
    start = (view.data or 0) + view.byte_offset + first * dtype.itemsize
    buffer = Buffer.wrap(owner, start, (last + 1 - first) * dtype.itemsize, device, writable=writable)
    return Tensor(buffer, dtype, shape, strides, -first * dtype.itemsize)


def _device_named(device_type: int, index: int) -> Device:
    if device_type in (_CPU, _CUDA_HOST):
        return Device("cpu")
    if device_type == _CUDA:
        return Device(f"cuda:{index}")
    raise DeviceError(f"DLPack device type {int(device_type)} is not supported; supported: CPU and CUDA")


def _dtype_of(view: _DLTensor) -> DType:
    key = (view.dtype.code, view.dtype.bits)
    if view.dtype.lanes != 1 or key not in _DTYPES:
        raise DTypeError(
            f"DLPack type with code {key[0]}, {key[1]} bits, {view.dtype.lanes} lanes is not supported; "
            f"supported: {', '.join(map(str, _TYPE_CODES))}"
        )
    return _DTYPES[key]


def _layout_of(view: _DLTensor) -> tuple[layout.Shape, layout.Shape]:
    shape = tuple(view.shape[i] for i in range(view.ndim))
    if not view.strides:
        return shape, layout.contiguous_strides(shape)
    return shape, tuple(view.strides[i] for i in range(view.ndim))
