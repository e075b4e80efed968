"""The safetensors container: a length, a JSON header, and the bytes of the tensors.

Source: the format description in the README of huggingface/safetensors. The reader is our own because the
package has no bfloat16 view for NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kuiperllm.checkpoint.base import TensorInfo, brief
from kuiperllm.checkpoint.json_file import parse_json
from kuiperllm.checkpoint.mapping import MappedFile
from kuiperllm.errors import CheckpointError, UnsupportedError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file: what it is and where it starts, from the beginning of the file."""

    info: TensorInfo
    dtype: np.dtype[Any]
    offset: int


class SafetensorsFile:
    """An opened safetensors file whose header has been checked in full.

    Raises:
        CheckpointError: the file is unreadable, truncated or corrupt.
        UnsupportedError: a tensor has an unknown data type.
    """

    def __init__(self, path: Path) -> None:
        self.file = MappedFile(path)
        header, self._data_start = self._header()
        self.entries = {name: self._entry(name, raw) for name, raw in header.items()}
        self._check_overlaps()

    def _header(self) -> tuple[dict[str, Any], int]:
        size, memory = self.file.size, self.file.memory
        if size < LENGTH_BYTES:
            raise self._corrupt(f"it has {size} bytes, too few for a safetensors file")
        length = int.from_bytes(memory[:LENGTH_BYTES], "little")
        if length > MAX_HEADER_BYTES:
            raise self._corrupt(f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        if length > size - LENGTH_BYTES:
            raise self._corrupt(f"its header claims {length} bytes, but the file has {size}")
        data_start = LENGTH_BYTES + length
        try:
            header = parse_json(memory[LENGTH_BYTES:data_start], unique_keys=True)
        except ValueError as error:
            raise self._corrupt(f"its header is not valid JSON: {error}") from None
        if not isinstance(header, dict):
            raise self._corrupt("its header is not a JSON object")
        header.pop("__metadata__", None)
        return header, data_start

    def _entry(self, name: str, raw: object) -> Entry:
        where = f"tensor {brief(name)}"
        if not isinstance(raw, dict):
            raise self._corrupt(f"{where} is not described by an object")
        dtype = DTYPES.get(raw["dtype"]) if isinstance(raw.get("dtype"), str) else None
        if dtype is None:
            raise UnsupportedError(
                f"{self.file.path}: {where} has the data type {brief(raw.get('dtype'))}, which is not "
                f"supported; supported: {', '.join(DTYPES)}"
            )
        shape, offsets = _whole_numbers(raw.get("shape")), _whole_numbers(raw.get("data_offsets"))
        if shape is None or len(shape) > MAX_DIMENSIONS:
            raise self._corrupt(f"{where} has the shape {brief(raw.get('shape'))}")
        if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._corrupt(f"{where} has the offsets {brief(raw.get('data_offsets'))}")
        begin, end = offsets
        available = self.file.size - self._data_start
        if end > available:
            raise self._corrupt(f"{where} ends at byte {brief(end)} of {available}; the file is truncated")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise self._corrupt(
                f"{where} has {end - begin} bytes, which is not what {dtype} of shape {brief(shape)} takes"
            )
        # Of an empty tensor the other dimensions are bounded by nothing yet; NumPy multiplies them too.
        if math.prod(d for d in shape if d) > 1 << 48:
            raise self._corrupt(f"{where} has the shape {brief(shape)}")
        info = TensorInfo(name, dtype.name, tuple(shape), end - begin)
        return Entry(info, dtype, self._data_start + begin)

    def _check_overlaps(self) -> None:
        end, owner = 0, ""
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.offset, entry.info.nbytes)):
            if entry.offset < end:
                raise self._corrupt(f"tensors {brief(owner)} and {brief(entry.info.name)} overlap")
            end, owner = entry.offset + entry.info.nbytes, entry.info.name

    def _corrupt(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {reason}")


def _whole_numbers(value: Any) -> list[int] | None:
    """`value` if it is a list of whole numbers from 0 up, else None."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None
