"""What each tensor becomes, and where everything will lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint import Checkpoint, TensorInfo
from kuiperllm.checkpoint.llama2c import EMBEDDING, HEAD
from kuiperllm.checkpoint.quantized import ours
from kuiperllm.checkpoint.writing import gguf, gguf_types, llama2c, safetensors
from kuiperllm.checkpoint.writing.convert import Section, same_values
from kuiperllm.checkpoint.writing.layout import ExportLayout
from kuiperllm.checkpoint.writing.storage import GroupStorage, PlainStorage, Storage
from kuiperllm.config import ModelConfig
from kuiperllm.core import DType
from kuiperllm.engine.export.documents import model_config
from kuiperllm.engine.export.options import KEEP, NONE, ExportOptions
from kuiperllm.errors import UnsupportedError
from kuiperllm.ops.rope.frequencies import frequency_divisors
from kuiperllm.quant import Scheme
from kuiperllm.quant.ggml import formats
from kuiperllm.quant.recoding import can_recode

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors that a model asks for, in the order in which they are to be written."""

_GGUF_FLOATS = {DType.float32: "F32", DType.float16: "F16", DType.bfloat16: "BF16"}


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2


def _float_type(info: TensorInfo, options: ExportOptions) -> DType:
    """What a floating-point tensor is stored in. float32 holds what is quantized in the source exactly."""
    if options.float_type is not None and _is_matrix(info.shape):
        return options.float_type
    stored = DType.float32 if info.scheme is not None else DType.of(info.dtype)
    return stored if stored.is_float else DType.float32


def _cannot_keep(checkpoint: Checkpoint, info: TensorInfo, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{checkpoint.path}: tensor {info.name} is {info.dtype}, which {where} cannot hold as it is; "
        "choose --quant none, q8 or q4"
    )


# --- safetensors ------------------------------------------------------------------------------------------


def plan_safetensors(
    checkpoint: Checkpoint, shapes: Shapes, options: ExportOptions, documents: Mapping[str, bytes]
) -> ExportLayout:
    """The layout of a Hugging Face folder; `documents` are its small files but for config.json.

    Raises:
        UnsupportedError: a tensor of the source cannot be kept as it is.
    """
    sections = [
        Section(name, shape, _storage(checkpoint, checkpoint.tensors[name], options))
        for name, shape in shapes.items()
    ]
    return safetensors.lay_out(sections, model_config(checkpoint, sections), documents)


def _storage(checkpoint: Checkpoint, info: TensorInfo, options: ExportOptions) -> Storage:
    """How a tensor is stored in safetensors. A matrix whose rows are not made of groups keeps its floats."""
    if _is_matrix(info.shape):
        if options.quant == KEEP and info.scheme is not None:
            if not ours.can_store(info.scheme):
                raise _cannot_keep(checkpoint, info, "safetensors")
            return GroupStorage(info.scheme)
        if options.scheme is not None and info.shape[1] % options.scheme.group_size == 0:
            return GroupStorage(options.scheme)
    return PlainStorage(_float_type(info, options))


# --- GGUF -------------------------------------------------------------------------------------------------


def plan_gguf(
    checkpoint: Checkpoint, shapes: Shapes, options: ExportOptions, tokenizer: Mapping[str, Any], name: str
) -> ExportLayout:
    """The layout of a GGUF file; `tokenizer` are the keys `tokenizer.*`, `name` is the model's.

    Raises:
        UnsupportedError: a tensor of the source cannot be kept as it is.
    """
    config = checkpoint.config
    sections = [
        Section(
            tensor,
            shape,
            gguf.storage_of(_gguf_type(checkpoint, tensor, shape, options)),
            gguf.interleaved_heads(config, tensor),
        )
        for tensor, shape in shapes.items()
    ]
    divisors = None
    if config.rope_scaling.rope_type == "llama3":
        divisors = frequency_divisors(config.head_dim, config.rope_theta, config.rope_scaling)
    return gguf.lay_out(
        sections,
        config,
        name=name,
        file_type=_file_type(checkpoint, options, sections),
        carried={**_general_keys(checkpoint), **tokenizer},
        divisors=divisors,
    )


def _general_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a GGUF source says of itself, such as author and licence."""
    keys = {key: value for key, value in checkpoint.metadata.items() if key.startswith("general.")}
    for of_the_file in ("general.alignment", "general.quantization_version"):
        keys.pop(of_the_file, None)
    return keys


def _gguf_type(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], options: ExportOptions) -> str:
    """ggml's name for what a tensor becomes. Vectors are F32, which llama.cpp asks for."""
    info = checkpoint.tensors[name]
    if not _is_matrix(shape):
        return "F32"
    if options.quant == KEEP and info.scheme is not None:
        kept = [known.name for known in formats().values() if _holds(known.kind, info.scheme)]
        if not kept:
            raise _cannot_keep(checkpoint, info, "GGUF")
        return kept[0]
    if options.quant not in (KEEP, NONE):
        mixture = gguf_types.find_mixture(options.quant)
        kind = gguf_types.tensor_type(mixture, name, shape, checkpoint.config)
        if kind is not None:
            return kind
    return _GGUF_FLOATS[_float_type(info, options)]


def _holds(kind: DType | Scheme, scheme: Scheme) -> bool:
    return isinstance(kind, Scheme) and can_recode(scheme, kind)


def _file_type(checkpoint: Checkpoint, options: ExportOptions, sections: list[Section]) -> int:
    """`general.file_type`: of the mixture, or of what most matrices are."""
    if options.quant not in (KEEP, NONE):
        return gguf_types.find_mixture(options.quant).number
    source = checkpoint.metadata.get("general.file_type")
    if options.quant == KEEP and type(source) is int:
        return source
    count: Counter[str] = Counter()
    for section in sections:
        if _is_matrix(section.shape):
            count[section.storage.name] += prod(section.shape)
    return gguf_types.file_type_of(count.most_common(1)[0][0])


# --- llama2.c ---------------------------------------------------------------------------------------------


def plan_llama2c(checkpoint: Checkpoint, shapes: Shapes, options: ExportOptions) -> ExportLayout:
    """The layout of a llama2.c file.

    Raises:
        UnsupportedError: the format cannot hold the model.
        UsageError: groups do not divide what they have to.
    """
    config, where = checkpoint.config, str(checkpoint.path)
    llama2c.check_network(config, shapes, where)
    version = options.llama2c_version
    header = llama2c.make_header(
        config,
        version=version,
        group_size=options.groups if version in llama2c.INT8_VERSIONS else 0,
        shared=config.tie_word_embeddings or _head_is_embedding(checkpoint),
        where=where,
    )
    return llama2c.lay_out(header, _tables(config))


def _head_is_embedding(checkpoint: Checkpoint) -> bool:
    """Whether the output projection repeats the embedding, which llama2.c stores once."""
    return same_values(checkpoint, HEAD, EMBEDDING)


def _tables(config: ModelConfig) -> NDArray[np.float32]:
    """Cosines and sines, float32 [2, positions, head_dim / 2]; angles are float32 as in the original."""
    steps = np.arange(0, config.head_dim, 2, dtype=np.float32)[: config.head_dim // 2]
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** (steps / np.float32(config.head_dim))
    angles = np.outer(np.arange(config.max_position_embeddings, dtype=np.float32), frequencies)
    tables = np.empty((2, *angles.shape), np.float32)
    tables[0], tables[1] = np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)
    return tables
