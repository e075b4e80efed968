"""Tensors of a checkpoint turned into the bytes of another, some rows at a time, on several threads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import Checkpoint, TensorInfo, Weight
from kuiperllm.checkpoint.rotary import interleaved_order
from kuiperllm.checkpoint.writing.storage import Bytes, Storage
from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, KuiperError, UnsupportedError
from kuiperllm.quant import QuantTensor, Scheme
from kuiperllm.quant.recoding import recode

Rounding = Callable[[NDArray[np.float32], Scheme], QuantTensor]
"""Rounds some rows of a matrix, float32 [n, K], to a scheme."""

_PIECE = 1 << 20  # weights that a thread works on at a time
_PIECES_KEPT = 64  # after so many, the mapped pages of the source are given up
_STRETCH = 1 << 15  # weights whose errors are added up at a time
_EXPONENT = {
    DType.float32: (np.uint32, 0x7F800000),
    DType.float16: (np.uint16, 0x7C00),
    DType.bfloat16: (np.uint16, 0x7F80),
}
"""The bits that are all set in NaN and infinities, and nowhere else."""


@dataclass(frozen=True, slots=True)
class Section:
    """A tensor that is to be written."""

    name: str
    """Its Hugging Face name, under which the source has it."""
    shape: tuple[int, ...]
    storage: Storage
    heads: int = 0
    """The rows of so many heads are written in the interleaved order (see `rotary`); 0: as they are."""

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.storage.nbytes(self.shape)


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of a tensor."""

    name: str
    shape: tuple[int, ...]
    source: str
    """How the source stores it."""
    stored: str
    """How it is stored now."""
    source_bytes: int
    nbytes: int
    squares: float
    """Sum of the squared weights; 0 where no weight changed."""
    squared_errors: float
    """Sum of the squares of what changed."""
    max_error: float
    """The largest change of a weight."""

    @property
    def relative_error(self) -> float:
        """Root mean square of what changed, relative to that of the weights."""
        return math.sqrt(self.squared_errors / self.squares) if self.squares else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Scales and the like included."""
        return 8 * self.nbytes / math.prod(self.shape)


class Change(NamedTuple):
    """How much some weights changed."""

    squares: float = 0.0
    """Sum of squared weights."""
    squared_errors: float = 0.0
    max_error: float = 0.0


class Converter:
    """Reads tensors, rounds them and makes bytes of them. A context manager: it has threads.

    Args:
        checkpoint: the source.
        rounding: how matrices are rounded.
        threads: how many pieces are worked on at once.
    """

    def __init__(self, checkpoint: Checkpoint, rounding: Rounding, threads: int) -> None:
        self.checkpoint = checkpoint
        self._rounding = rounding
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "export")
        self.reports: list[TensorReport] = []
        """Of the tensors that were converted."""

    def __enter__(self) -> Converter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def convert(self, section: Section, rounded: QuantTensor | None = None) -> Iterator[tuple[Bytes, ...]]:
        """The bytes of each part of a tensor, some rows at a time, from front to back.

        Args:
            section: the tensor.
            rounded: it, if somebody has rounded it already.

        Raises:
            CheckpointError: it holds NaN or infinity.
            UnsupportedError: a weight is too large for the type that it is to be stored in.
        """
        info = self.checkpoint.tensors[section.name]
        weight = self.checkpoint.load(section.name)
        order = interleaved_order(section.heads, section.shape[0] // section.heads) if section.heads else None
        waiting: deque[Future[tuple[tuple[Bytes, ...], Change]]] = deque()
        changes: list[Change] = []

        def finished() -> tuple[Bytes, ...]:
            encoded, change = waiting.popleft().result()
            changes.append(change)
            return encoded

        def work(first: int, after: int) -> tuple[tuple[Bytes, ...], Change]:
            rows = slice(first, after) if order is None else order[first:after]
            return self._rows(section, weight[rows], None if rounded is None else rounded[rows])

        try:
            for number, (first, after) in enumerate(_row_ranges(section), start=1):
                waiting.append(self._pool.submit(work, first, after))
                if len(waiting) > 2 * self._threads:
                    yield finished()
                if number % _PIECES_KEPT == 0:  # so that of a large embedding not all is resident
                    self.checkpoint.release(section.name)
            while waiting:
                yield finished()
        except KuiperError as error:
            raise type(error)(f"{self.checkpoint.path}: tensor {section.name}: {error}") from None
        finally:
            for future in waiting:
                future.cancel()
        self.checkpoint.release(section.name)
        self.reports.append(_report(section, info, changes))

    def _rows(
        self, section: Section, rows: Weight, rounded: QuantTensor | None
    ) -> tuple[tuple[Bytes, ...], Change]:
        """Some rows as bytes, and how they changed."""
        storage = section.storage
        if isinstance(storage.kind, Scheme):
            codes, change = self._quantized(storage, storage.kind, rows, rounded)
            return storage.encode(codes), change
        values, change = _floating(storage.kind, rows)
        return storage.encode(values), change

    def _quantized(
        self, storage: Storage, scheme: Scheme, rows: Weight, rounded: QuantTensor | None
    ) -> tuple[QuantTensor, Change]:
        if isinstance(rows, QuantTensor):
            kept = recode(rows, scheme)
            if kept is not None and kept.scheme.scale is rows.scheme.scale:
                _require_finite_scales(kept)
                return kept, Change()
            rounded = kept if kept is not None else rounded
        floats = _floats(rows)
        if rounded is None:
            rounded = self._rounding(storage.rows_to_groups(floats), scheme)
        return rounded, _change(floats, rounded.dequantize().reshape(floats.shape))


def same_values(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors of one shape hold the same numbers; stops reading at the first difference."""
    first, second = checkpoint.load(name), checkpoint.load(other)
    step = max(1, _PIECE // math.prod(first.shape[1:]))
    try:
        return all(
            np.array_equal(_as_floats(first[rows]), _as_floats(second[rows]))
            for rows in (slice(start, start + step) for start in range(0, first.shape[0], step))
        )
    finally:
        checkpoint.release(name)
        checkpoint.release(other)


def _row_ranges(section: Section) -> Iterator[tuple[int, int]]:
    """First row and the row after the last of each piece; a vector is all one piece."""
    rows = section.shape[0]
    step = rows
    if len(section.shape) > 1:
        columns = math.prod(section.shape[1:])
        kind = section.storage.kind
        whole = 1  # rows that together are made of whole groups
        if isinstance(kind, Scheme):
            whole = kind.group_size // math.gcd(kind.group_size, columns)
        step = max(1, _PIECE // columns // whole) * whole
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _floats(rows: Weight) -> NDArray[np.float32]:
    """In float32, which holds every value of every type exactly; all finite."""
    floats = _as_floats(rows)
    _require_finite(floats, DType.float32)
    return floats


def _as_floats(rows: Weight) -> NDArray[np.float32]:
    if not isinstance(rows, QuantTensor):
        return np.ascontiguousarray(rows, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return rows.dequantize()


def _floating(dtype: DType, rows: Weight) -> tuple[NDArray[Any], Change]:
    if not isinstance(rows, QuantTensor) and rows.dtype == dtype.numpy:
        _require_finite(rows, dtype)
        return rows, Change()
    floats = _floats(rows)
    if dtype is DType.float32:
        return floats, Change()
    with np.errstate(over="ignore"):
        values: NDArray[Any] = floats.astype(dtype.numpy)
    restored = values.astype(np.float32)
    if not all_finite(values, dtype):
        raise UnsupportedError(
            f"a weight of {np.abs(floats).max():.3g} is too large for {dtype}; choose another --dtype"
        )
    return values, _change(floats, restored)


def _require_finite_scales(tensor: QuantTensor) -> None:
    for part in (tensor.scales, tensor.zeros, tensor.super_scales, tensor.super_zeros):
        if part is not None and part.dtype.kind == "f":
            _require_finite(part, DType.of(part.dtype))


def _require_finite(values: NDArray[Any], dtype: DType) -> None:
    if not all_finite(values, dtype):
        raise CheckpointError("a weight is NaN or infinite; the checkpoint is damaged, get it again")


def all_finite(values: NDArray[Any], dtype: DType) -> bool:
    """Whether no value is NaN or infinite; several times as fast as NumPy's own for 16-bit types."""
    word, exponent = _EXPONENT[dtype]
    bits = np.ascontiguousarray(values).view(word) & word(exponent)
    return not bits.size or int(bits.max()) != exponent


def _change(before: NDArray[np.float32], after: NDArray[np.float32]) -> Change:
    """Sums in float32 over stretches that stay in the cache, and of those in float64."""
    squares = squared_errors = largest = 0.0
    flat, changed = before.reshape(-1), after.reshape(-1)
    for start in range(0, len(flat), _STRETCH):
        weights = flat[start : start + _STRETCH]
        errors = weights - changed[start : start + _STRETCH]
        squares += float(np.einsum("i,i->", weights, weights))
        squared_errors += float(np.einsum("i,i->", errors, errors))
        largest = max(largest, float(errors.max()), -float(errors.min()))
    return Change(squares, squared_errors, largest)


def _report(section: Section, info: TensorInfo, changes: list[Change]) -> TensorReport:
    return TensorReport(
        name=section.name,
        shape=section.shape,
        source=info.dtype,
        stored=section.storage.name,
        source_bytes=info.nbytes,
        nbytes=section.nbytes,
        squares=math.fsum(change.squares for change in changes),
        squared_errors=math.fsum(change.squared_errors for change in changes),
        max_error=max((change.max_error for change in changes), default=0.0),
    )
