"""ZIP archives whose entries are stored as they are, so that each is a stretch of the mapped file.

Source: PKWARE's APPNOTE.TXT, 4.3 (layout) and 4.5.3 (sizes of 64 bits). Only what the central directory lists
counts. Nothing is decompressed, so an entry cannot be larger than the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kuiperllm.checkpoint.base import brief
from kuiperllm.checkpoint.mapping import MappedFile
from kuiperllm.errors import CheckpointError, UnsupportedError

MAGIC = b"PK\x03\x04"
MAX_ENTRIES = 100_000  # an entry takes some hundred bytes of memory

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_CENTRAL_MAGIC, _END_MAGIC = b"PK\x01\x02", b"PK\x05\x06"
_END_64_MAGIC, _LOCATOR_MAGIC = b"PK\x06\x06", b"PK\x06\x07"
_MAX_COMMENT = 0xFFFF
_IN_EXTRA = 0xFFFFFFFF  # stands for a number that the extra field holds in 64 bits
_EXTRA_64 = 1
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """A file of the archive: `nbytes` bytes from `offset` of the archive on."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the central directory says of an entry, whose local header is at `header`."""

    name: bytes
    header: int
    nbytes: int


class StoredZip:
    """An opened archive, all of whose headers have been checked.

    Raises:
        CheckpointError: it is truncated or corrupt, or entries overlap or share a name.
        UnsupportedError: an entry is compressed or encrypted.
    """

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        count, start, end = self._central_directory()
        self.entries: dict[str, StoredEntry] = {}
        previous_end, previous = 0, ""
        for listed in sorted(self._listed(count, start, end), key=lambda listed: listed.header):
            name = _text(listed.name)
            if name in self.entries:
                raise self._corrupt(f"entry {brief(name)} appears twice")
            if listed.header < previous_end:
                raise self._corrupt(f"entries {brief(previous)} and {brief(name)} overlap")
            offset = self._data_offset(listed)
            if offset + listed.nbytes > start:
                raise self._corrupt(f"entry {brief(name)} reaches beyond the end of the entries")
            self.entries[name] = StoredEntry(name, offset, listed.nbytes)
            previous_end, previous = offset + listed.nbytes, name

    def read(self, entry: StoredEntry) -> bytes:
        """A copy of the bytes of an entry."""
        return self.file.memory[entry.offset : entry.offset + entry.nbytes]

    def _central_directory(self) -> tuple[int, int, int]:
        """Number of entries, and first and last offset of the directory that lists them."""
        memory, size = self.file.memory, self.file.size
        at = memory.rfind(_END_MAGIC, max(0, size - _END.size - _MAX_COMMENT))
        if at < 0 or at + _END.size > size:
            raise self._corrupt("has no directory at its end, so it is truncated; copy or download it again")
        _, disk, start_disk, _, count, nbytes, start, _ = _END.unpack_from(memory, at)
        end = at
        locator_at = at - _LOCATOR.size
        if locator_at >= 0 and memory[locator_at : locator_at + 4] == _LOCATOR_MAGIC:
            _, disk, end, _ = _LOCATOR.unpack_from(memory, locator_at)
            if end + _END_64.size > locator_at or memory[end : end + 4] != _END_64_MAGIC:
                raise self._corrupt("the offset of its directory is wrong")
            _, _, _, _, _, start_disk, _, count, nbytes, start = _END_64.unpack_from(memory, end)
        if disk or start_disk:
            raise UnsupportedError(f"{self.file.path}: is a part of a ZIP archive that was split")
        if start + nbytes > end:
            raise self._corrupt(f"its directory claims bytes {start} to {start + nbytes}, but ends by {end}")
        if count > min(MAX_ENTRIES, nbytes // _CENTRAL.size):
            raise self._corrupt(f"its directory claims {count} entries in {nbytes} bytes")
        return count, start, start + nbytes

    def _listed(self, count: int, start: int, end: int) -> Iterator[_Listed]:
        memory, at = self.file.memory, start
        for number in range(count):
            if at + _CENTRAL.size > end:
                raise self._corrupt(f"its directory ends within entry {number}")
            fields = _CENTRAL.unpack_from(memory, at)
            magic, _, _, flags, method, _, _, _, packed, nbytes, name_size, extra_size, comment_size = fields[
                :13
            ]
            header = fields[16]
            at += _CENTRAL.size
            if magic != _CENTRAL_MAGIC or at + name_size + extra_size + comment_size > end:
                raise self._corrupt(f"entry {number} of its directory is damaged")
            name = memory[at : at + name_size]
            at += name_size
            packed, nbytes, header = self._in_64_bits(memory[at : at + extra_size], packed, nbytes, header)
            at += extra_size + comment_size
            if flags & _ENCRYPTED or method or packed != nbytes:
                how = "encrypted" if flags & _ENCRYPTED else "compressed"
                raise UnsupportedError(
                    f"{self.file.path}: entry {brief(_text(name))} is {how}; "
                    "torch.save stores entries as they are, and nothing else is read"
                )
            yield _Listed(name, header, nbytes)

    def _in_64_bits(self, extra: bytes, packed: int, nbytes: int, header: int) -> tuple[int, int, int]:
        """The three numbers, those that do not fit into 32 bits taken from the extra field."""
        at = 0
        while at + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, at)
            if kind == _EXTRA_64:
                wanted = [nbytes, packed, header].count(_IN_EXTRA)
                if size < 8 * wanted or at + 4 + size > len(extra):
                    break
                wide = iter(struct.unpack_from(f"<{wanted}Q", extra, at + 4))
                nbytes = next(wide) if nbytes == _IN_EXTRA else nbytes
                packed = next(wide) if packed == _IN_EXTRA else packed
                header = next(wide) if header == _IN_EXTRA else header
                return packed, nbytes, header
            at += 4 + size
        if _IN_EXTRA in (packed, nbytes, header):
            raise self._corrupt("an entry of its directory lacks its size in 64 bits")
        return packed, nbytes, header

    def _data_offset(self, listed: _Listed) -> int:
        """Where the bytes of an entry begin: behind its local header, whose own sizes are of no account."""
        memory, at = self.file.memory, listed.header
        if at + _LOCAL.size > self.file.size:
            raise self._corrupt(f"entry {brief(_text(listed.name))} begins at byte {at} of {self.file.size}")
        magic, _, _, _, _, _, _, _, _, name_size, extra_size = _LOCAL.unpack_from(memory, at)
        name_at = at + _LOCAL.size
        if magic != MAGIC or memory[name_at : name_at + name_size] != listed.name:
            raise self._corrupt(f"entry {brief(_text(listed.name))} is not where its directory says")
        return name_at + int(name_size) + int(extra_size)

    def _corrupt(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {reason}")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
