"""Files as `torch.save` and Meta write them, made without torch from the descriptions of ZIP and pickle."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]

STORAGES = {
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


# --- pickle -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    code: bytes


@dataclass(frozen=True)
class TensorCode:
    """What torch.save writes for a tensor, however wrong."""

    shape: Any
    strides: Any
    count: Any
    key: Any = "0"
    offset: Any = 0
    storage: str = "torch\nFloatStorage\n"
    more: tuple[Any, ...] = (False, Raw(b"ccollections\nOrderedDict\n)R"))
    function: str = "torch._utils\n_rebuild_tensor_v2\n"


def opcodes(value: Any) -> bytes:
    """A value by protocol 2, without memo."""
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, TensorCode):
        storage = ("storage", Raw(b"c" + value.storage.encode()), value.key, "cpu", value.count)
        arguments = (Raw(opcodes(storage) + b"Q"), value.offset, value.shape, value.strides, *value.more)
        return b"c" + value.function.encode() + opcodes(arguments) + b"R"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    assert isinstance(value, dict)
    return b"}(" + b"".join(opcodes(key) + opcodes(item) for key, item in value.items()) + b"u"


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


# --- ZIP --------------------------------------------------------------------------------------------------


def archive(
    entries: Mapping[str, bytes],
    *,
    align: int = 64,
    shift: int = 0,
    wide: bool = True,
    wide_sizes: bool = False,
    method: int = 0,
    flags: int = 0x800,
) -> bytes:
    """A ZIP archive of stored entries.

    Args:
        entries: contents by name.
        align: data of entries begins at multiples of this, as torch.save pads local headers ...
        shift: ... plus this.
        wide: with the 64-bit end record, as torch.save writes it.
        wide_sizes: sizes and offsets stand in the extra field, as in files beyond 4 GB.
        method: 0, or whatever the directory is to claim.
        flags: of all entries.
    """
    out, directory = b"", b""
    for name, data in entries.items():
        raw = name.encode()
        header = len(out)
        pad = (shift - header - 30 - len(raw) - 4) % align
        # torch.save leaves checksum and sizes of the local header empty
        out += struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, flags, method, 0, 0, 0, 0, 0, len(raw), pad + 4)
        out += raw + struct.pack("<2H", 0x4246, pad) + b"Z" * pad + data
        extra, size, place = b"", len(data), header
        if wide_sizes:
            extra = struct.pack("<2H3Q", 1, 24, size, size, header)
            size = place = 0xFFFFFFFF
        fields = (
            0,
            0,
            flags,
            method,
            0,
            0,
            zlib.crc32(data),
            size,
            size,
            len(raw),
            len(extra),
            0,
            0,
            0,
            0,
            place,
        )
        directory += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + raw + extra
    start, count = len(out), len(entries)
    out += directory
    if wide:
        end = len(out)
        out += struct.pack(
            "<4sQ2H2I4Q", b"PK\x06\x06", 44, 798, 45, 0, 0, count, count, len(directory), start
        )
        out += struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    return out + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)


def container(
    value: Any, storages: Mapping[str, bytes], *, name: str = "consolidated.00", **options: Any
) -> bytes:
    """A file of torch.save: a value, or the bytes of a pickle, and its storages."""
    entries = {f"{name}/data.pkl": value if isinstance(value, bytes) else pickled(value)}
    entries |= {f"{name}/byteorder": b"little"}
    entries |= {f"{name}/data/{key}": data for key, data in storages.items()}
    entries |= {f"{name}/version": b"3\n", f"{name}/.data/serialization_id": b"0" * 40}
    return archive(entries, **options)


def saved(value: Any, **options: Any) -> bytes:
    """What torch.save writes: plain data, with arrays for tensors. The same array is one storage."""
    storages: dict[str, bytes] = {}
    keys: dict[int, str] = {}

    def coded(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: coded(inner) for key, inner in item.items()}
        if not isinstance(item, np.ndarray):
            return item
        key = keys.setdefault(id(item), str(len(keys)))
        storages[key] = item.tobytes()
        strides = tuple(int(np.prod(item.shape[axis + 1 :])) for axis in range(item.ndim))
        storage = f"torch\n{STORAGES[item.dtype]}\n"
        return TensorCode(item.shape, strides, item.size, key, storage=storage)

    return container(coded(value), storages, **options)


# --- Meta's checkpoints -----------------------------------------------------------------------------------

MODEL_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def meta_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in MODEL_NAMES:
        return f"{MODEL_NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"layers.{layer}.{LAYER_NAMES[part]}.weight"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of half-split heads in the interleaved order: channels i and i + d/2 become neighbours."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def as_meta(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Hugging Face tensors under Meta's names and in its row order."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    named = {}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        named[meta_name(name)] = interleaved(tensor, heads[part]) if part in heads else tensor
    return named


def cut(tensors: Tensors, shards: int, *, embedding_axis: int = 1) -> list[Tensors]:
    """What each rank holds; `embedding_axis` is 1 for Llama 1 and 2, and 0 for Llama 3."""
    ranks: list[Tensors] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        axis = embedding_axis if name.startswith("tok_embeddings") else int(".wo." in name or ".w2." in name)
        parts = [tensor] * shards if tensor.ndim == 1 else np.split(tensor, shards, axis)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.copy()
    return ranks


def params_of(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """params.json; the feed-forward size comes out of the rule with `multiple_of` of that very size."""
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": -1,
        "multiple_of": config["intermediate_size"],
        "ffn_dim_multiplier": 1.5 / int(8 * config["hidden_size"] / 3),
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
    }
    return {key: value for key, value in (params | changes).items() if value is not None}


def write_meta(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any],
    *,
    shards: int = 1,
    embedding_axis: int = 1,
    dtype: Any = None,
    extra: Mapping[str, np.ndarray] | None = None,
    params: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A folder of Meta's, from tensors under Hugging Face names; `options` are those of `archive`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params_of(config, **(params or {}))))
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    ranks = cut(as_meta(tensors, config), shards, embedding_axis=embedding_axis)
    for rank, state in enumerate(ranks):
        state |= {"rope.freqs": np.ones(4, np.float32)} | dict(extra or {})
        (folder / f"consolidated.{rank:02}.pth").write_bytes(saved(state, **options))
    return folder
