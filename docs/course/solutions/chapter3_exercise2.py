"""Reads a DLPack capsule of any library and leaves it as it is."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

_READ_ONLY = 1
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


class _DLTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))


@dataclass(frozen=True)
class Described:
    """What a capsule says."""

    version: tuple[int, int] | None
    """None in the form from before versions."""
    device: tuple[int, int]
    """Type (1 is the host, 2 CUDA) and index."""
    dtype: str
    """Such as "float32"."""
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """In elements; None where the producer leaves them out, which means contiguous."""
    read_only: bool
    address: int
    """Of the first element."""


def describe(capsule: object) -> Described:
    """What is in a capsule that nobody has consumed.

    Raises:
        ValueError: it is consumed, or no capsule of DLPack.
    """
    name = _name(capsule)
    if name == b"dltensor":
        version, flags = None, 0
        tensor = _DLTensor.from_address(_pointer(capsule, name))
    elif name == b"dltensor_versioned":
        managed = _Versioned.from_address(_pointer(capsule, name))
        version, flags, tensor = (managed.major, managed.minor), managed.flags, managed.tensor
    else:
        raise ValueError(f"not a capsule that can be read: {name!r}")
    return Described(
        version=version,
        device=(tensor.device_type, tensor.device_id),
        dtype=f"{_KINDS.get(tensor.code, f'code {tensor.code} ')}{tensor.bits}",
        shape=tuple(tensor.shape[: tensor.ndim]),
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        read_only=bool(flags & _READ_ONLY),
        address=(tensor.data or 0) + tensor.byte_offset,
    )
