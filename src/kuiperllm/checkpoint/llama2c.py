"""Checkpoints of karpathy/llama2.c: version 0 (no magic), version 1 (float32) and version 2 (int8 groups).

Also those that zjhellofss/KuiperLLama calls version 3: the header of version 0 and a group size, int8 groups,
the embedding in float32 near the end.

Source: export.py, run.c and runq.c of llama2.c, tools/export.py of KuiperLLama. All of them are Llama
networks with rotary base 10000 and norm epsilon 1e-5; query and key rows are in the interleaved order. A text
begins with token 1 and ends with 2.
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
from kuiperllm.quant import Scheme, int8_tensor, q8

MAGIC = 0x616B3432  # "ak42"
VERSIONS = (1, 2)
HEADER_BYTES = 256  # of versions 1 and 2; version 0 has seven numbers only
_NUMBERS = struct.Struct("<7i")
_NUMBERS_AND_GROUP_SIZE = struct.Struct("<8i")
_MAGIC = struct.Struct("<Ii")
_FLOAT = np.dtype(np.float32)
_SMALLEST_GROUP = 16

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TABLES = "cosines and sines"  # precomputed rotary tables, which nobody needs
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
        norms = [_INPUT_NORM, _POST_NORM]
        matrices = [part for part in shapes if part not in norms]
        embedding, norm = (EMBEDDING, (self.vocab_size, self.dim)), (NORM, (self.dim,))
        head = [] if self.shared_classifier else [(HEAD, (self.vocab_size, self.dim))]
        if self.version == 0:
            yield embedding
            yield from self._layers(list(shapes), shapes)
            yield norm
            yield TABLES, (2, self.max_seq_len, self.head_dim // 2)
            yield from head
        elif self.version == 3:
            yield from self._layers(matrices, shapes)
            yield from head
            yield embedding
            yield from self._layers(norms, shapes)
            yield norm
        else:
            yield from self._layers(norms, shapes)
            yield norm
            yield embedding
            yield from self._layers(matrices, shapes)
            yield from head

    def _layers(
        self, parts: list[str], shapes: dict[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in parts:
            for layer in range(self.layers):
                yield f"model.layers.{layer}.{part}.weight", shapes[part]

    @property
    def nbytes(self) -> int:
        """Of the header in the file."""
        if self.version in VERSIONS:
            return HEADER_BYTES
        return _NUMBERS_AND_GROUP_SIZE.size if self.version == 3 else _NUMBERS.size

    @property
    def file_nbytes(self) -> int:
        """Of the whole file."""
        return self.nbytes + sum(self.nbytes_of(name, shape) for name, shape in self.sections())

    def is_quantized(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight is int8 groups: matrices are, in version 3 but for the embedding."""
        return self.group_size > 0 and len(shape) == 2 and not (self.version == 3 and name == EMBEDDING)

    @property
    def groups_divide_matrices(self) -> bool:
        """Whether the elements of every quantized matrix are whole groups."""
        matrices = (shape for name, shape in self.sections() if self.is_quantized(name, shape))
        return self.group_size > 0 and not any(math.prod(shape) % self.group_size for shape in matrices)

    def scheme(self, name: str, shape: tuple[int, ...]) -> Scheme | None:
        """What a weight is read as; None: float32.

        Groups run over the flattened matrix. Where one crosses the end of a row, the parts of groups that
        divide rows stand for it, each with the scale of the whole; where those would be less than 16 columns,
        which kernels do not take, the matrix is float32.
        """
        if not self.is_quantized(name, shape):
            return None
        parts = math.gcd(self.group_size, shape[1])
        if parts < min(self.group_size, _SMALLEST_GROUP):
            return None
        return q8(parts, DType.float32)

    def nbytes_of(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of a weight in the file."""
        count = math.prod(shape)
        if self.is_quantized(name, shape):
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
        UnsupportedError: the version is unknown, or groups do not divide a matrix.
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
                f"{path}: llama2.c version {header.version} is not supported; supported: 0, 1, 2, and 3 of "
                "KuiperLLama"
            )
        if header.version == 0:
            header = self._as_version_3(header) or header
        if not header.is_plausible:
            raise CheckpointError(f"{path}: its header describes no possible network: {header}")
        if header.version == 2 and not header.groups_divide_matrices:
            raise UnsupportedError(
                f"{path}: int8 groups of {header.group_size} do not divide all of its matrices; "
                "export it again with a group size that does"
            )
        return header

    def _as_version_3(self, header: Header) -> Header | None:
        """The header of version 3, if that is what the file is; only its size tells it from version 0."""
        if self._file.size < _NUMBERS_AND_GROUP_SIZE.size or self._file.size == header.file_nbytes:
            return None
        *_, group_size = _NUMBERS_AND_GROUP_SIZE.unpack_from(self._file.memory)
        other = replace(header, version=3, group_size=group_size)
        return other if other.groups_divide_matrices and self._file.size == other.file_nbytes else None

    def _layout(self) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        """Descriptions and offsets of all tensors, after checking that they fill the file exactly."""
        header, path = self._header, self._file.path
        infos, offsets = {}, {}
        offset = header.nbytes
        for name, shape in header.sections():
            nbytes = header.nbytes_of(name, shape)
            scheme = header.scheme(name, shape)
            dtype = _FLOAT.name if scheme is None else scheme.name
            infos[name], offsets[name] = TensorInfo(name, dtype, shape, nbytes, scheme), offset
            offset += nbytes
        if offset != self._file.size:
            raise CheckpointError(
                f"{path}: a llama2.c version {header.version} checkpoint with this header takes {offset} "
                f"bytes, but the file has {self._file.size}; copy or download it again"
            )
        infos.pop(TABLES, None)
        return infos, offsets

    def _load(self, info: TensorInfo) -> Weight:
        offset = self._offsets[info.name]
        order = self._row_order(info.name)
        if not self._header.is_quantized(info.name, info.shape):
            weight = self._file.array(offset, _FLOAT, info.shape)
            return weight if order is None else weight[order]
        group_size, count = self._header.group_size, math.prod(info.shape)
        scales = self._file.array(offset + count, _FLOAT, (count // group_size,))
        values = self._file.array(offset, np.dtype(np.int8), (count,))
        if info.scheme is None:
            flat = int8_tensor(values.reshape(-1, group_size), scales[:, None])
            weight = flat.dequantize().reshape(info.shape)
            return weight if order is None else weight[order]
        if (times := group_size // info.scheme.group_size) > 1:
            scales = np.repeat(scales, times)
        quantized = int8_tensor(values.reshape(info.shape), scales.reshape(info.shape[0], -1))
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
