"""Files of karpathy/llama2.c, versions 0, 1 and 2, and of zjhellofss/KuiperLLama, version 3.

Source: export.py, run.c and runq.c of the former, tools/export.py of the latter. What these programs take for
granted cannot be said in a file, so a network that differs is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint.llama2c import EMBEDDING, HEADER_BYTES, MAGIC, TABLES, Header
from kuiperllm.checkpoint.writing.convert import Section
from kuiperllm.checkpoint.writing.layout import Constant, ExportLayout, packed
from kuiperllm.checkpoint.writing.storage import FlatInt8Storage, PlainStorage, Storage
from kuiperllm.config import ModelConfig
from kuiperllm.core.dtype import DType
from kuiperllm.errors import UnsupportedError, UsageError
from kuiperllm.quant import q8

FLOAT_VERSIONS, INT8_VERSIONS = (0, 1), (2, 3)
DEFAULT_GROUP_SIZE = 64
_RMS_NORM_EPS, _ROPE_THETA, _BOS, _EOS = 1e-5, 10000.0, 1, 2


def check_network(config: ModelConfig, tensors: Mapping[str, object], where: str) -> None:
    """Refuse a network that llama2.c would compute differently.

    Raises:
        UnsupportedError: it has a part, or a constant, that these files cannot hold.
    """
    wrong = None
    biases = [name for name in tensors if name.endswith(".bias")]
    if config.model_type != "llama":
        wrong = f"the architecture {config.model_type}"
    elif biases:
        wrong = f"biases ({biases[0]})"
    elif config.rope_scaling.rope_type != "default":
        wrong = f"rope scaling ({config.rope_scaling.rope_type})"
    elif config.rope_theta != _ROPE_THETA:
        wrong = f"a rope base of {config.rope_theta:g} (10000 is taken for granted)"
    elif config.rms_norm_eps != _RMS_NORM_EPS:
        wrong = f"a norm epsilon of {config.rms_norm_eps:g} (1e-05 is taken for granted)"
    elif config.head_dim * config.num_attention_heads != config.hidden_size:
        wrong = f"heads of {config.head_dim} that do not make up {config.hidden_size} channels"
    elif config.bos_token_id not in (None, _BOS):
        wrong = f"texts that begin with token {config.bos_token_id} (1 is taken for granted)"
    elif config.eos_token_ids and _EOS not in config.eos_token_ids:
        wrong = f"texts that end with token {config.eos_token_ids[0]} (2 is taken for granted)"
    if wrong is not None:
        raise UnsupportedError(
            f"{where}: the format llama2c cannot hold {wrong}; export to safetensors or gguf"
        )


def make_header(config: ModelConfig, *, version: int, group_size: int, shared: bool, where: str) -> Header:
    """What the file says of its network.

    Args:
        config: the network.
        version: 0 to 3.
        group_size: of versions 2 and 3; 0 for the others.
        shared: whether the embedding is also the output projection.
        where: what to call the source in messages.

    Raises:
        UsageError: groups do not divide rows, which version 2 needs, or matrices, which version 3 needs.
    """
    header = Header(
        version,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.max_position_embeddings,
        shared,
        group_size,
    )
    matrices = [shape for shape in header.shapes().values() if len(shape) == 2]
    if version == 2 and any(shape[1] % group_size for shape in matrices):
        raise UsageError(
            f"{where}: groups of {group_size} do not divide rows of {header.dim} and {header.hidden_dim} "
            f"weights, which version 2 needs; {_other_group_sizes(header)}"
        )
    if version == 3 and any(shape[0] * shape[1] % group_size for shape in matrices):
        raise UsageError(
            f"{where}: groups of {group_size} do not divide all matrices; choose another --group-size"
        )
    return header


def _other_group_sizes(header: Header) -> str:
    sizes = [size for size in (128, 64, 32, 16, 8, 4) if header.dim % size == header.hidden_dim % size == 0]
    return f"choose --group-size {sizes[0]}" if sizes else "export version 3 or another format"


def lay_out(header: Header, tables: NDArray[np.float32]) -> ExportLayout:
    """The file.

    Args:
        header: what it says of its network.
        tables: cosines, then sines, of each position and frequency, float32 [2, positions, head_dim / 2];
            version 0 stores them.
    """
    sections: list[Section | Constant] = []
    for name, shape in header.sections():
        if name == TABLES:
            sections.append(Constant(tables))
        else:
            sections.append(Section(name, shape, _storage(header, name, shape), _heads(header, name)))
    return ExportLayout([packed(None, _header_bytes(header), sections)])


def _storage(header: Header, name: str, shape: tuple[int, ...]) -> Storage:
    keeps_floats = header.version == 3 and name == EMBEDDING
    if header.version in FLOAT_VERSIONS or len(shape) == 1 or keeps_floats:
        return PlainStorage(DType.float32)
    return FlatInt8Storage(q8(header.group_size, DType.float32))


def _heads(header: Header, name: str) -> int:
    if name.endswith("q_proj.weight"):
        return header.heads
    return header.kv_heads if name.endswith("k_proj.weight") else 0


def _header_bytes(header: Header) -> bytes:
    legacy = header.version in (0, 3)
    vocab_size = header.vocab_size if header.shared_classifier or not legacy else -header.vocab_size
    numbers = struct.pack(
        "<7i",
        header.dim,
        header.hidden_dim,
        header.layers,
        header.heads,
        header.kv_heads,
        vocab_size,
        header.max_seq_len,
    )
    if legacy:
        return numbers + (struct.pack("<i", header.group_size) if header.version == 3 else b"")
    flags = struct.pack("<B", header.shared_classifier)
    if header.version == 2:
        flags += struct.pack("<i", header.group_size)
    return (struct.pack("<Ii", MAGIC, header.version) + numbers + flags).ljust(HEADER_BYTES, b"\0")
