"""Hugging Face checkpoints: config.json beside one safetensors file or several shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kuiperllm.checkpoint.base import Checkpoint, TensorInfo, Weight, brief
from kuiperllm.checkpoint.json_file import read_config, require_file
from kuiperllm.checkpoint.quantized import read_contents
from kuiperllm.checkpoint.safetensors_file import Entry, SafetensorsFile
from kuiperllm.config import GenerationDefaults, ModelConfig
from kuiperllm.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20


class SafetensorsCheckpoint(Checkpoint):
    """Tensors of one or several safetensors files, with the configuration of their folder.

    Args:
        path: what the user named: the folder, or the file.
        folder: where config.json lies.
        files: file of each tensor, by tensor name.

    Raises:
        CheckpointError: config.json is missing, or the parts of a quantized matrix do not fit together.
        ConfigError: config.json or generation_config.json cannot be understood.
        UnsupportedError: the network, or how it is quantized, needs something that is not implemented.
    """

    format = "safetensors"

    def __init__(self, path: Path, folder: Path, files: Mapping[str, SafetensorsFile]) -> None:
        raw, where = _read_config(folder)
        config = ModelConfig.from_hf(raw, where=where)
        used = [name for name in files if not (config.tie_word_embeddings and name.startswith("lm_head."))]
        contents = read_contents(raw, {name: files[name].entries[name].info for name in used}, where)
        infos = [*contents.plain.values(), *(matrix.info for matrix in contents.matrices.values())]
        super().__init__(
            path, config, {info.name: info for info in infos}, generation=_read_generation_defaults(folder)
        )
        self._files = files
        self._matrices = contents.matrices

    def _load(self, info: TensorInfo) -> Weight:
        matrix = self._matrices.get(info.name)
        if matrix is None:
            return self._array(info.name)
        arrays = {suffix: self._array(name) for suffix, name in matrix.parts.items()}
        return matrix.load(arrays, str(self.path))

    def _array(self, name: str) -> NDArray[Any]:
        source, entry = self._find(name)
        return source.file.array(entry.offset, entry.dtype, entry.info.shape)

    def _release(self, info: TensorInfo) -> None:
        matrix = self._matrices.get(info.name)
        for name in (info.name,) if matrix is None else matrix.parts.values():
            source, entry = self._find(name)
            source.file.release(entry.offset, entry.info.nbytes)

    def _find(self, name: str) -> tuple[SafetensorsFile, Entry]:
        source = self._files[name]
        return source, source.entries[name]

    def close(self) -> None:
        """Give up the files; loading from them is an error from here on."""
        for source in self._files.values():
            source.file.close()


def open_single(path: Path, *, source: Path) -> SafetensorsCheckpoint:
    """Open one file with the config.json beside it; a shard opens the checkpoint that it belongs to.

    `source` is what the user named: this file, or its folder.

    Raises:
        KuiperError: as `SafetensorsCheckpoint` and `SafetensorsFile`.
    """
    index = path.parent / INDEX_FILE
    if path.name != SINGLE_FILE and index.is_file() and path.name in _read_index(index).values():
        return open_sharded(path.parent)
    file = SafetensorsFile(path)
    return SafetensorsCheckpoint(source, path.parent, dict.fromkeys(file.entries, file))


def open_sharded(folder: Path) -> SafetensorsCheckpoint:
    """Open the shards that `model.safetensors.index.json` lists.

    Raises:
        CheckpointError: a shard is missing or corrupt, or lacks a tensor that the index puts there.
        ConfigError: the index or a configuration cannot be understood.
        UnsupportedError: the network or a data type is not supported.
    """
    weight_map = _read_index(folder / INDEX_FILE)
    shards: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        path = require_file(folder / shard, f"{INDEX_FILE} lists it; copy or download it again")
        shards[shard] = SafetensorsFile(path)
    for name, shard in weight_map.items():
        if name not in shards[shard].entries:
            raise CheckpointError(
                f"{folder / shard}: lacks tensor {brief(name)}, which {INDEX_FILE} puts there"
            )
    return SafetensorsCheckpoint(folder, folder, {name: shards[shard] for name, shard in weight_map.items()})


def _read_index(path: Path) -> dict[str, str]:
    """File name of each tensor's shard."""
    weight_map = read_config(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    for name, shard in weight_map.items():
        # A plain file name, so that an index cannot reach outside its folder.
        if (
            not isinstance(shard, str)
            or shard in ("", ".", "..")
            or "/" in shard
            or "\\" in shard
            or "\0" in shard
        ):
            raise CheckpointError(
                f"{path}: tensor {brief(name)} lies in {brief(shard)}, which is no file name"
            )
    return weight_map


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The contents of config.json, and what to call it."""
    path = require_file(folder / "config.json", "it describes the network and must lie beside the weights")
    return read_config(path), str(path)


def _read_generation_defaults(folder: Path) -> GenerationDefaults:
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    return GenerationDefaults.from_hf(read_config(path), where=str(path))
