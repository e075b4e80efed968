"""Where everything lies in the files of an export, which is known before the first byte is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.writing.convert import Converter, Section
from kuiperllm.checkpoint.writing.output import Output, OutputFile
from kuiperllm.quant import QuantTensor

Rounded = Callable[[str], QuantTensor | None]
"""Gives a matrix that somebody has rounded already, or None; asked once for each tensor, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """Values that are no tensor of the source, such as tables of rotary embedding."""

    values: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.values.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class FileLayout:
    """One file: a header, then sections at ascending offsets, with zeros between them."""

    name: str | None
    """None: the main file."""
    header: bytes
    sections: Sequence[tuple[int, Section | Constant]]
    """With the offset of each."""
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ExportLayout:
    """Everything that an export writes."""

    files: Sequence[FileLayout]
    """The main file first."""
    documents: Mapping[str, bytes] = field(default_factory=dict)
    """Small files, by name: configuration, tokenizer."""
    is_folder: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files) + sum(map(len, self.documents.values()))

    def with_documents(self, documents: Mapping[str, bytes]) -> ExportLayout:
        """The same, and some small files."""
        return replace(self, documents={**self.documents, **documents})

    @property
    def sections(self) -> Iterator[Section]:
        """The tensors, in the order in which they are written."""
        for file in self.files:
            for _, section in file.sections:
                if isinstance(section, Section):
                    yield section


def packed(
    name: str | None, header: bytes, sections: Sequence[Section | Constant], alignment: int = 1
) -> FileLayout:
    """Sections one after the other behind a header, each at a multiple of `alignment`."""
    position, placed = len(header), []
    for section in sections:
        position = -(-position // alignment) * alignment
        placed.append((position, section))
        position += section.nbytes
    return FileLayout(name, header, placed, -(-position // alignment) * alignment)


def write(
    layout: ExportLayout,
    output: Output,
    converter: Converter,
    *,
    rounded: Rounded | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all files of a layout, from front to back.

    Args:
        layout: what lies where.
        output: where the files go.
        converter: turns tensors into bytes.
        rounded: gives matrices that are not to be rounded here.
        progress: told of (bytes written, bytes in all).

    Raises:
        KuiperError: a tensor cannot be read or converted, or the disk is full.
    """
    total, done = layout.nbytes, 0
    for plan in layout.files:
        with output.create(plan.name) as file:
            file.write(np.frombuffer(plan.header, np.uint8))
            for offset, section in plan.sections:
                file.pad_to(offset)
                for nbytes in _write_section(section, file, converter, rounded):
                    done += nbytes
                    if progress is not None:
                        progress(done, total)
            file.pad_to(plan.nbytes)
    for name, data in layout.documents.items():
        output.add(name, data)
    if progress is not None:
        progress(total, total)


def _write_section(
    section: Section | Constant,
    file: OutputFile,
    converter: Converter,
    rounded: Rounded | None,
) -> Iterator[int]:
    """Write one section; gives the bytes written after each piece."""
    if isinstance(section, Constant):
        file.write(section.values)
        yield section.nbytes
        return
    start = file.position
    behind: list[tuple[NDArray[np.uint8], ...]] = []  # the parts after the first, a fraction of its size
    for first, *others in converter.convert(section, rounded(section.name) if rounded is not None else None):
        file.write(first)
        behind.append(tuple(others))
        yield len(first)
    written = file.position
    for part in zip(*behind, strict=True):
        for piece in part:
            file.write(piece)
    assert file.position == start + section.nbytes
    yield file.position - written
