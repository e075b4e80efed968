"""A Hugging Face folder: config.json, one safetensors file or several shards with an index.

Source: the format description in the README of huggingface/safetensors, and how transformers names shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kuiperllm.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE
from kuiperllm.checkpoint.safetensors_file import DTYPES
from kuiperllm.checkpoint.writing.convert import Section
from kuiperllm.checkpoint.writing.layout import ExportLayout, FileLayout, packed

SHARD_BYTES = 5_000_000_000
_ALIGNMENT = 8  # of the data, so that every element is aligned when the file is mapped
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def lay_out(
    sections: Sequence[Section],
    config: Mapping[str, Any],
    documents: Mapping[str, bytes],
) -> ExportLayout:
    """The files of a folder, each of `SHARD_BYTES` at most unless one tensor has more.

    Args:
        sections: its tensors, in the order that they are written in.
        config: the contents of config.json.
        documents: other small files, by name.
    """
    shards = list(_shards(sections))
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = [_file(name, shard) for name, shard in zip(names, shards, strict=True)]
    written = {"config.json": as_json(config)}
    if len(shards) > 1:
        written[INDEX_FILE] = as_json(_index(names, shards))
    return ExportLayout(files, {**written, **documents}, is_folder=True)


def as_json(value: Any) -> bytes:
    """A JSON file."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")


def _shards(sections: Iterable[Section]) -> Iterable[list[Section]]:
    shard: list[Section] = []
    nbytes = 0
    for section in sections:
        if shard and nbytes + section.nbytes > SHARD_BYTES:
            yield shard
            shard, nbytes = [], 0
        shard.append(section)
        nbytes += section.nbytes
    yield shard


def _file(name: str, sections: Sequence[Section]) -> FileLayout:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for section in sections:
        for part in section.storage.parts(section.shape):
            entries[section.name + part.suffix] = {
                "dtype": _NAMES[part.dtype.numpy],
                "shape": list(part.shape),
                "data_offsets": [end, end + part.nbytes],
            }
            end += part.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return packed(name, len(text).to_bytes(8, "little") + text, sections)


def _index(names: Sequence[str], shards: Sequence[Sequence[Section]]) -> dict[str, Any]:
    weight_map = {
        section.name + part.suffix: name
        for name, shard in zip(names, shards, strict=True)
        for section in shard
        for part in section.storage.parts(section.shape)
    }
    total = sum(section.nbytes for shard in shards for section in shard)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
