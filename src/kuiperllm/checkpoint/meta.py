"""Meta's own checkpoints: params.json beside consolidated.00.pth, consolidated.01.pth, ...

Source: model.py and generation.py of meta-llama/llama and meta-llama/llama-models. Each file holds the share
of one of the GPUs that the network was trained on: of some matrices its rows, of others its columns, and all
of the norms. Query and key rows are in the interleaved order.

The training checkpoints of karpathy/llama2.c (`ckpt.pt`) hold the same names in one file, with the parameters
inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import Checkpoint, TensorInfo, Weight, brief
from kuiperllm.checkpoint.json_file import read_config, require_file
from kuiperllm.checkpoint.meta_params import config_of
from kuiperllm.checkpoint.rotary import half_split_order
from kuiperllm.checkpoint.sharded import Part, ShardedTensor
from kuiperllm.checkpoint.torch_file import TorchFile, TorchTensor
from kuiperllm.config import MAX_DIMENSION, ModelConfig
from kuiperllm.config.reader import FieldReader
from kuiperllm.errors import CheckpointError, UnsupportedError

PARAMS_FILE = "params.json"
_SHARD = re.compile(r"consolidated\.([0-9]{2})\.pth", re.ASCII)

EMBEDDING, HEAD, GATE = "model.embed_tokens", "lm_head", "mlp.gate_proj"
_MODEL_NAMES = {"tok_embeddings": EMBEDDING, "norm": "model.norm", "output": HEAD}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": GATE,
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_NAME = re.compile(r"(?:layers\.(?P<layer>0|[1-9][0-9]{0,5})\.)?(?P<part>[a-z0-9_.]+)\.weight", re.ASCII)
# Rotary tables, which follow from the configuration.
_TABLES = re.compile(
    r"(?:layers\.[0-9]+\.attention\.inner_attention\.)?rope\.freqs|freqs_(?:cis|cos|sin)", re.ASCII
)
_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # each shard has some of their columns
_FLOATS = ("bfloat16", "float16", "float32")
_COMPILED = "_orig_mod."  # in front of names that torch.compile has gone over

State = Mapping[str, TorchTensor]


class MetaCheckpoint(Checkpoint):
    """Tensors under Meta's names from one or several files.

    Args:
        path: what the user named: the folder, or a file that is complete by itself.
        params: the fields of params.json.
        where: where they come from, for messages.
        shards: files, and tensors by name, in the order of their ranks.

    Raises:
        CheckpointError: the files contradict each other or the parameters.
        ConfigError: a parameter is missing or out of range.
        UnsupportedError: there are tensors of another network, or of another type than floating point.
    """

    format = "meta"

    def __init__(
        self, path: Path, params: Mapping[str, Any], where: str, shards: Sequence[tuple[TorchFile, State]]
    ) -> None:
        self._files = [file for file, _ in shards]
        for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
            if name not in shards[0][1]:
                raise CheckpointError(
                    f"{self._files[0].path}: lacks tensor {name}; is it a part of a Llama network?"
                )
        dim = FieldReader(params, where).integer("dim", low=1, high=MAX_DIMENSION)
        self._sources = _combine(shards, dim)
        tied = self._drop_tied_head()
        embedding = self._sources[f"{EMBEDDING}.weight"]
        config = config_of(
            params,
            where,
            vocab_size=embedding.shape[0],
            intermediate_size=self._sources[f"model.layers.0.{GATE}.weight"].shape[0],
            tied=tied,
            dtype=embedding.dtype.name,
        )
        infos = {
            name: TensorInfo(name, source.dtype.name, source.shape, source.nbytes)
            for name, source in self._sources.items()
        }
        super().__init__(path, config, infos)
        self._check_shapes()

    def _drop_tied_head(self) -> bool:
        """Whether the output projection is the embedding: absent, the same storage, or the same bytes.

        To find the latter out, both have to be read if they are equal; other pairs differ at once.
        """
        head = self._sources.get(f"{HEAD}.weight")
        if head is not None and not head.equals(self._sources[f"{EMBEDDING}.weight"]):
            return False
        self._sources.pop(f"{HEAD}.weight", None)
        return True

    def _check_shapes(self) -> None:
        for name, shape in _shapes(self.config).items():
            if (found := self._info(name).shape) != shape:
                raise CheckpointError(
                    f"{self.path}: {name} has the shape {list(found)}, put together from {len(self._files)} "
                    f"file(s), but the parameters ask for {list(shape)}; a shard is missing, or they are of "
                    "different models"
                )
        for name in self.tensors.keys() - _shapes(self.config).keys():
            raise CheckpointError(
                f"{self.path}: has tensor {name}, but the parameters ask for "
                f"{self.config.num_hidden_layers} layers"
            )

    def _load(self, info: TensorInfo) -> Weight:
        return self._sources[info.name].load(self._row_order(info.name))

    def _row_order(self, name: str) -> NDArray[np.intp] | None:
        """The order that makes query and key rows half-split; None for any other tensor."""
        if name.endswith("q_proj.weight"):
            return half_split_order(self.config.num_attention_heads, self.config.head_dim)
        if name.endswith("k_proj.weight"):
            return half_split_order(self.config.num_key_value_heads, self.config.head_dim)
        return None

    def _release(self, info: TensorInfo) -> None:
        self._sources[info.name].release()

    def close(self) -> None:
        """Give up the files; loading from them is an error from here on."""
        for file in self._files:
            file.close()


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What the parameters say of every tensor."""
    dim, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{EMBEDDING}.weight": (config.vocab_size, dim),
        "model.norm.weight": (dim,),
    }
    if not config.tie_word_embeddings:
        shapes[f"{HEAD}.weight"] = (config.vocab_size, dim)
    of_layer = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (config.q_size, dim),
        "self_attn.k_proj": (config.kv_size, dim),
        "self_attn.v_proj": (config.kv_size, dim),
        "self_attn.o_proj": (dim, config.q_size),
        "post_attention_layernorm": (dim,),
        GATE: (inner, dim),
        "mlp.up_proj": (inner, dim),
        "mlp.down_proj": (dim, inner),
    }
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in of_layer.items()}
    return shapes


# --- opening ----------------------------------------------------------------------------------------------


def shard_names(names: Sequence[str]) -> list[str]:
    """Those names of a folder's files that are of shards, by rank."""
    return sorted(name for name in names if _SHARD.fullmatch(name))


def open_meta(folder: Path, names: Sequence[str]) -> MetaCheckpoint:
    """Open all shards of a folder.

    Args:
        folder: where they lie, with params.json.
        names: their names, by rank; see `shard_names`.

    Raises:
        KuiperError: as `MetaCheckpoint` and `TorchFile`; or a shard is missing.
    """
    params_path = require_file(
        folder / PARAMS_FILE, "it describes the network and must lie beside the weights"
    )
    params = read_config(params_path)
    for rank, name in enumerate(names):
        wanted = f"consolidated.{rank:02}.pth"
        if name != wanted:
            raise CheckpointError(
                f"{folder}: the shard {wanted} is missing, but {name} is there; copy or download it again"
            )
    files = [TorchFile(folder / name) for name in names]
    return MetaCheckpoint(
        folder, params, str(params_path), [(file, _state(file, file.root)) for file in files]
    )


def open_training(file: TorchFile) -> MetaCheckpoint | None:
    """A training checkpoint of llama2.c; None if the file is something else.

    Raises:
        KuiperError: as `MetaCheckpoint`.
    """
    root = file.root
    if not isinstance(root, dict) or not isinstance(root.get("model_args"), dict) or "model" not in root:
        return None
    state = {name.removeprefix(_COMPILED): tensor for name, tensor in _state(file, root["model"]).items()}
    checkpoint = MetaCheckpoint(file.path, root["model_args"], f"{file.path}: model_args", [(file, state)])
    checkpoint.format = "llama2.c training"
    return checkpoint


def _state(file: TorchFile, root: object) -> State:
    """The tensors of a file by name."""
    if not isinstance(root, dict) or not root:
        raise CheckpointError(f"{file.path}: holds no dictionary of tensors")
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, TorchTensor):
            raise CheckpointError(f"{file.path}: {brief(name)} is no tensor with a name")
    return root


# --- names and shards -------------------------------------------------------------------------------------


def _combine(shards: Sequence[tuple[TorchFile, State]], dim: int) -> dict[str, ShardedTensor]:
    """The tensors of all files by Hugging Face name."""
    first_file, first = shards[0]
    for file, state in shards[1:]:
        for name in first.keys() ^ state.keys():
            lacking, having = (file, first_file) if name in first else (first_file, file)
            raise CheckpointError(f"{lacking.path}: lacks tensor {brief(name)}, which {having.path.name} has")
    return {
        _hugging_face_name(name, first_file.path): _side_by_side(
            name, [Part(file, state[name]) for file, state in shards], dim
        )
        for name in first
        if not _TABLES.fullmatch(name)
    }


def _hugging_face_name(name: str, path: Path) -> str:
    match = _NAME.fullmatch(name)
    layer = match and match["layer"]
    known = _MODEL_NAMES if layer is None else _LAYER_NAMES
    if match is None or match["part"] not in known:
        raise UnsupportedError(f"{path}: tensor {brief(name)} belongs to no part of a Llama network")
    part = known[match["part"]]
    return f"{part}.weight" if layer is None else f"model.layers.{layer}.{part}.weight"


def _side_by_side(name: str, parts: Sequence[Part], dim: int) -> ShardedTensor:
    """The parts of one tensor, after checking that they go together."""
    first = parts[0].tensor
    if first.dtype.name not in _FLOATS:
        raise UnsupportedError(
            f"{parts[0].file.path}: tensor {brief(name)} is of {first.dtype}, which is not supported; "
            f"supported: {', '.join(_FLOATS)}"
        )
    if len(first.shape) not in (1, 2) or 0 in first.shape:
        raise CheckpointError(f"{parts[0].file.path}: tensor {brief(name)} has the shape {list(first.shape)}")
    for part in parts[1:]:
        if (part.tensor.dtype, part.tensor.shape) != (first.dtype, first.shape):
            raise CheckpointError(
                f"{part.file.path}: tensor {brief(name)} is {part.tensor.dtype} of shape "
                f"{list(part.tensor.shape)}, but {first.dtype} of shape {list(first.shape)} in "
                f"{parts[0].file.path.name}"
            )
    # Norms are the same for all ranks.
    return ShardedTensor(parts[:1] if len(first.shape) == 1 else parts, _axis(name, first.shape, dim))


def _axis(name: str, shape: tuple[int, ...], dim: int) -> int:
    """Along which the parts of a matrix were cut: output projections of blocks by columns, others by rows.

    The embedding was cut by columns for Llama 1 and 2 (fairscale's ParallelEmbedding), and by rows for
    Llama 3 (VocabParallelEmbedding); the parts of the latter have all of the network's `dim` columns.
    """
    if len(shape) == 1:
        return 0
    if name.startswith("tok_embeddings."):
        return 0 if shape[1] == dim else 1
    return 1 if name.endswith(_BY_COLUMNS) else 0
