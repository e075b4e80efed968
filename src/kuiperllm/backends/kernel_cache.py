"""Compiled kernels on disk, for every back end: entries that survive crashes, damage and company.

An entry is named by a key made of all that it depends on, carries that key and a checksum, is written under a
temporary name and renamed. So any number of processes may fill the cache at once, and a damaged entry counts
as none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

_MAGIC = b"KUIPERKRN2"
_HEADER = struct.Struct("<10s32s32sII")  # magic, SHA-256 of the rest, key, length of the text, of the code

on_compile: list[Callable[[str], None]] = []
"""Called with a kernel's name before it is compiled, so that a front end can say why it takes a moment."""


class Entry(NamedTuple):
    """A compiled kernel."""

    text: str
    """What the back end wants to know about the code."""
    code: bytes
    """What the processor runs."""


def announce(name: str) -> None:
    """Tell whoever listens that a kernel is about to be compiled."""
    for callback in on_compile:
        callback(name)


def read_entry(path: Path, key: str) -> Entry | None:
    """The entry at `path`; None if it is not there, damaged, or has another key (hexadecimal SHA-256)."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if len(raw) < _HEADER.size:
        return None
    magic, checksum, found, text_size, code_size = _HEADER.unpack_from(raw)
    body = raw[_HEADER.size :]
    if magic != _MAGIC or found != bytes.fromhex(key) or len(body) != text_size + code_size:
        return None
    if hashlib.sha256(body).digest() != checksum:
        return None
    return Entry(body[:text_size].decode(), body[text_size:])


def write_entry(path: Path, key: str, entry: Entry) -> None:
    """Keep an entry; where that is impossible, say so in the log and go on."""
    text = entry.text.encode()
    body = text + entry.code
    header = _HEADER.pack(
        _MAGIC, hashlib.sha256(body).digest(), bytes.fromhex(key), len(text), len(entry.code)
    )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(header + body)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:  # a read-only or full cache costs time, not correctness
        log.warning("cannot keep compiled kernels in %s: %s", path.parent, error.strerror)
