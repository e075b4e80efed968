"""Checkpoints of karpathy/llama2.c: version 0 (no magic), version 1 (float32) and version 2 (int8 groups).

Source: export.py, run.c and runq.c of that project. All of them are Llama networks with rotary base 10000 and
norm epsilon 1e-5; query and key rows are in the interleaved order. Token 1 begins a text, and 2 ends it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.base import Checkpoint, TensorInfo, Weight
from kuiperllm.checkpoint.mapping import MappedFile
from kuiperllm.checkpoint.rotary import half_split_order
from kuiperllm.config import MAX_DIMENSION, MAX_LAYERS, ModelConfig
from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, UnsupportedError
from kuiperllm.quant import int8_tensor, q8

MAGIC = 0x616B3432  # "ak42"
VERSIONS = (1, 2)
HEADER_BYTES = 256  # of versions 1 and 2; version 0 has seven numbers only
_NUMBERS = struct.Struct("<7i")
_MAGIC = struct.Struct("<Ii")
_FLOAT = np.dtype(np.float32)

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_TABLES = "cosines and sines"  # precomputed rotary tables, which nobody needs
_INPUT_NORM, _POST_NORM = "input_layernorm", "post_attention_layernorm"


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its network. `group_size` is 0 for float32."""

    version: int
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    max_seq_len: int
    shared_classifier: bool = True
    group_size: int = 0

    @property
    def is_plausible(self) -> bool:
        """Whether such a network can exist; tells a version 0 file from any other bytes."""
        sizes = (self.dim, self.hidden_dim, self.vocab_size, self.max_seq_len)
        return (
            all(1 <= size <= MAX_DIMENSION for size in sizes)
            and 1 <= self.layers <= MAX_LAYERS
            and 1 <= self.kv_heads <= self.heads <= self.dim
            and self.dim % (2 * self.heads) == 0
            and self.heads % self.kv_heads == 0
        )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight of a layer."""
        kv_dim = self.kv_heads * self.head_dim
        return {
            _INPUT_NORM: (self.dim,),
            "self_attn.q_proj": (self.dim, self.dim),
            "self_attn.k_proj": (kv_dim, self.dim),
            "self_attn.v_proj": (kv_dim, self.dim),
            "self_attn.o_proj": (self.dim, self.dim),
            _POST_NORM: (self.dim,),
            "mlp.gate_proj": (self.hidden_dim, self.dim),
            "mlp.down_proj": (self.dim, self.hidden_dim),
            "mlp.up_proj": (self.hidden_dim, self.dim),
        }

    def sections(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of everything in the file, in its order."""
        shapes = self.shapes()
        embedding, norm = (EMBEDDING, (self.vocab_size, self.dim)), (NORM, (self.dim,))
        if self.version == 0:
            yield embedding
            yield from self._layers(list(shapes), shapes)
            yield norm
            yield _TABLES, (2, self.max_seq_len, self.head_dim // 2)
        else:
            norms = [_INPUT_NORM, _POST_NORM]
            yield from self._layers(norms, shapes)
            yield norm
            yield embedding
            yield from self._layers([part for part in shapes if part not in norms], shapes)
        if not self.shared_classifier:
            yield HEAD, (self.vocab_size, self.dim)

    def _layers(
        self, parts: list[str], shapes: dict[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in parts:
            for layer in range(self.layers):
                yield f"model.layers.{layer}.{part}.weight", shapes[part]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight in the file: only matrices are quantized."""
        count = math.prod(shape)
        if self.group_size and len(shape) == 2:
            return count + count // self.group_size * _FLOAT.itemsize
        return count * _FLOAT.itemsize

    def config(self, where: str) -> ModelConfig:
        """The configuration in Hugging Face's terms."""
        raw = {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.dim,
            "intermediate_size": self.hidden_dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_seq_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.shared_classifier,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return ModelConfig.from_hf(raw, where=where)


def parse_header(start: bytes) -> Header | None:
    """The header at the beginning of a file, or None if these bytes cannot be one of llama2.c."""
    if len(start) < _NUMBERS.size:
        return None
    magic, version = _MAGIC.unpack_from(start)
    if magic == MAGIC:
        if len(start) < HEADER_BYTES:
            return None
        header = Header(version, *_NUMBERS.unpack_from(start, _MAGIC.size))
        # The flag is one byte, and the group size follows it unaligned.
        shared, group_size = struct.unpack_from("<Bi", start, _MAGIC.size + _NUMBERS.size)
        return replace(header, shared_classifier=shared != 0, group_size=group_size if version == 2 else 0)
    header = Header(0, *_NUMBERS.unpack_from(start))
    # Version 0 says by the sign whether the classifier has weights of its own.
    signed = header.vocab_size
    header = replace(header, vocab_size=abs(signed), shared_classifier=signed > 0)
    return header if header.is_plausible else None


class Llama2cCheckpoint(Checkpoint):
    """One llama2.c file.

    Raises:
        CheckpointError: the file is not of llama2.c, or its size is not what its header asks for.
        UnsupportedError: the version is unknown, or groups cross the ends of rows.
    """

    format = "llama2.c"

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        self._header = self._checked_header()
        infos, self._offsets = self._layout()
        super().__init__(path, self._header.config(str(path)), infos)

    def _checked_header(self) -> Header:
        path = self._file.path
        header = parse_header(self._file.memory[:HEADER_BYTES])
        if header is None:
            raise CheckpointError(f"{path}: does not begin with the header of a llama2.c checkpoint")
        if header.version not in (0, *VERSIONS):
            raise UnsupportedError(
                f"{path}: llama2.c version {header.version} is not supported; supported: 0, 1 and 2"
            )
        if not header.is_plausible:
            raise CheckpointError(f"{path}: its header describes no possible network: {header}")
        group = header.group_size
        if header.version == 2 and (group < 1 or header.dim % group or header.hidden_dim % group):
            raise UnsupportedError(
                f"{path}: int8 groups of {group} do not divide rows of {header.dim} and {header.hidden_dim} "
                "weights; export it again with a group size that does"
            )
        return header

    def _layout(self) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        """Descriptions and offsets of all tensors, after checking that they fill the file exactly."""
        header, path = self._header, self._file.path
        infos, offsets = {}, {}
        offset = HEADER_BYTES if header.version else _NUMBERS.size
        for name, shape in header.sections():
            nbytes = header.nbytes(shape)
            is_quantized = header.group_size > 0 and len(shape) == 2
            scheme = q8(header.group_size, DType.float32) if is_quantized else None
            dtype = _FLOAT.name if scheme is None else scheme.name
            infos[name], offsets[name] = TensorInfo(name, dtype, shape, nbytes, scheme), offset
            offset += nbytes
        if offset != self._file.size:
            raise CheckpointError(
                f"{path}: a llama2.c version {header.version} checkpoint with this header takes {offset} "
                f"bytes, but the file has {self._file.size}; copy or download it again"
            )
        infos.pop(_TABLES, None)
        return infos, offsets

    def _load(self, info: TensorInfo) -> Weight:
        offset = self._offsets[info.name]
        order = self._row_order(info.name)
        if info.scheme is None:
            weight = self._file.array(offset, _FLOAT, info.shape)
            return weight if order is None else weight[order]
        rows, columns = info.shape
        values = self._file.array(offset, np.dtype(np.int8), info.shape)
        groups = columns // self._header.group_size
        scales = self._file.array(offset + rows * columns, _FLOAT, (rows, groups))
        quantized = int8_tensor(values, scales)
        return quantized if order is None else quantized[order]

    def _row_order(self, name: str) -> NDArray[np.intp] | None:
        """The order that makes query and key rows half-split; None for any other tensor."""
        if name.endswith("q_proj.weight"):
            return half_split_order(self._header.heads, self._header.head_dim)
        if name.endswith("k_proj.weight"):
            return half_split_order(self._header.kv_heads, self._header.head_dim)
        return None

    def _release(self, info: TensorInfo) -> None:
        self._file.release(self._offsets[info.name], info.nbytes)

    def close(self) -> None:
        """Give up the file; loading from it is an error from here on."""
        self._file.close()
