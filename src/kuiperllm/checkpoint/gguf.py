"""GGUF files as checkpoints: names, configuration and row order translated to Hugging Face's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kuiperllm.checkpoint.base import Checkpoint, TensorInfo, Weight, brief
from kuiperllm.checkpoint.gguf_config import ARCHITECTURES, read_config
from kuiperllm.checkpoint.gguf_file import GgufFile, GgufTensor
from kuiperllm.checkpoint.mapping import aligned
from kuiperllm.checkpoint.rotary import half_split_order
from kuiperllm.config import ModelConfig
from kuiperllm.errors import CheckpointError, UnsupportedError
from kuiperllm.quant import Scheme

MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(
    r"(?:blk\.(?P<layer>0|[1-9][0-9]{0,5})\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)", re.ASCII
)
# Tables that the rotary embedding of the graph computes, or that the configuration has taken in already.
_TABLES = re.compile(r"rope_freqs\.weight|blk\.[0-9]+\.attn_rot_embd\.weight", re.ASCII)


class GgufCheckpoint(Checkpoint):
    """One GGUF file.

    Raises:
        CheckpointError: the file is truncated or corrupt, or contradicts itself.
        ConfigError: a key is missing or out of range.
        UnsupportedError: architecture, tensor type or a part of the network is not supported.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self._gguf = GgufFile(path)
        config = read_config(self._gguf)
        self._sources = _translate(self._gguf.tensors, config, path)
        infos = {name: _info(name, tensor) for name, tensor in self._sources.items()}
        super().__init__(path, config, infos, metadata=self._gguf.metadata)
        self._interleaved = ARCHITECTURES[self.metadata["general.architecture"]].interleaved

    def _load(self, info: TensorInfo) -> Weight:
        tensor = self._sources[info.name]
        raw = self._gguf.file.raw(tensor.offset, tensor.nbytes)
        if self._interleaved and (heads := self._rotary_heads(info.name)):
            self.expect(info.name, (heads * self.config.head_dim, *info.shape[1:]))
            rows = raw.reshape(info.shape[0], -1)
            raw = rows[half_split_order(heads, self.config.head_dim)].reshape(-1)
        # float32 has the strictest alignment of all formats
        return tensor.format.unpack(aligned(raw, np.dtype(np.float32).alignment), info.shape)

    def _rotary_heads(self, name: str) -> int:
        """Heads of a projection whose rows rotary embedding pairs; 0 for any other tensor."""
        if ".self_attn.q_proj." in name:
            return self.config.num_attention_heads
        if ".self_attn.k_proj." in name:
            return self.config.num_key_value_heads
        return 0

    def _release(self, info: TensorInfo) -> None:
        tensor = self._sources[info.name]
        self._gguf.file.release(tensor.offset, tensor.nbytes)

    def close(self) -> None:
        """Give up the file; loading from it is an error from here on."""
        self._gguf.file.close()


def _info(name: str, tensor: GgufTensor) -> TensorInfo:
    kind = tensor.format.kind
    if isinstance(kind, Scheme):
        return TensorInfo(name, tensor.format.name, tensor.shape, tensor.nbytes, kind)
    return TensorInfo(name, str(kind), tensor.shape, tensor.nbytes)


def _translate(tensors: Mapping[str, GgufTensor], config: ModelConfig, path: Path) -> dict[str, GgufTensor]:
    """Tensors by Hugging Face name."""
    translated = {}
    for name, tensor in tensors.items():
        if not _TABLES.fullmatch(name):
            if tensor.format.block_size > 1 and len(tensor.shape) != 2:
                raise UnsupportedError(
                    f"{path}: tensor {brief(name)} is {tensor.format.name} of shape {list(tensor.shape)}; "
                    f"{tensor.format.name} is supported for matrices"
                )
            translated[_hugging_face_name(name, config.num_hidden_layers, path)] = tensor
    return translated


def _hugging_face_name(name: str, layers: int, path: Path) -> str:
    match = _NAME.fullmatch(name)
    layer = match and match["layer"]
    known: Mapping[str, str] = MODEL_NAMES if layer is None else LAYER_NAMES
    if match is None or match["part"] not in known:
        raise UnsupportedError(
            f"{path}: tensor {brief(name)} belongs to no part of the supported networks "
            f"({', '.join(ARCHITECTURES)})"
        )
    if layer is None:
        return f"{known[match['part']]}.{match['kind']}"
    if int(layer) >= layers:
        raise CheckpointError(f"{path}: has tensor {brief(name)}, but its header says {layers} layers")
    return f"model.layers.{layer}.{known[match['part']]}.{match['kind']}"
