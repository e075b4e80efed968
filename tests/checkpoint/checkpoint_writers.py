"""Small checkpoints of every format, written by other packages or straight from the format descriptions."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
from gguf.quants import quantize

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Tensors = dict[str, np.ndarray]


def make_tensors(
    config: dict[str, Any] = CONFIG, dtype: Any = np.float32, *, bias: bool = False, seed: int = 0
):
    """Random weights under Hugging Face names."""
    rng = np.random.default_rng(seed)
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (d,),
            p + "self_attn.q_proj.weight": (d, d),
            p + "self_attn.k_proj.weight": (kv, d),
            p + "self_attn.v_proj.weight": (kv, d),
            p + "self_attn.o_proj.weight": (d, d),
            p + "post_attention_layernorm.weight": (d,),
            p + "mlp.gate_proj.weight": (f, d),
            p + "mlp.up_proj.weight": (f, d),
            p + "mlp.down_proj.weight": (d, f),
        }
        if bias:
            shapes |= {f"{p}self_attn.{x}_proj.bias": ((d if x == "q" else kv),) for x in "qkv"}
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return {name: rng.normal(0, 0.1, shape).astype(dtype) for name, shape in shapes.items()}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rows to interleaved ones: channel i of a half goes to 2 i, or 2 i + 1."""
    out = np.empty_like(rows)
    half = rows.shape[0] // heads // 2
    for h in range(heads):
        for i in range(half):
            out[h * 2 * half + 2 * i] = rows[h * 2 * half + i]
            out[h * 2 * half + 2 * i + 1] = rows[h * 2 * half + half + i]
    return out


def as_interleaved(tensors: Tensors, config: dict[str, Any] = CONFIG) -> Tensors:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return {
        n: interleave(t, heads[n.split(".")[-2]]) if n.split(".")[-2] in heads else t
        for n, t in tensors.items()
    }


# --- Hugging Face folders ---------------------------------------------------------------------------------


def write_folder(folder: Path, tensors: Tensors, config: dict[str, Any] = CONFIG, *, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        safetensors.numpy.save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def raw_safetensors(header: object, data: bytes = b"") -> bytes:
    """A file with this header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- GGUF -------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def write_gguf(
    path: Path,
    tensors: Tensors,
    config: dict[str, Any] = CONFIG,
    *,
    arch: str = "llama",
    matrices: str = "F32",
    kinds: dict[str, str] | None = None,
    extra: Tensors | None = None,
    more: Any = None,
) -> Path:
    """Written by the `gguf` package.

    `kinds` are the types of matrices that are given as bytes, [rows, row bytes]; the others are quantized to
    `matrices`. `more` is called with the writer to add keys.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}é" for i in range(config["vocab_size"])])
    writer.add_token_scores([-0.5 * i for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if more:
        more(writer)
    kind = gguf.GGMLQuantizationType[matrices]
    for name, tensor in (as_interleaved(tensors, config) if arch == "llama" else tensors).items():
        if name in (kinds or {}):
            given = gguf.GGMLQuantizationType[kinds[name]]
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor), raw_dtype=given)
        elif tensor.ndim == 2 and matrices != "F32":
            writer.add_tensor(gguf_name(name), quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), tensor)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where the float16 numbers of a block lie, from the block structs of ggml-common.h.
SCALES = {
    **dict.fromkeys(["Q4_0", "Q5_0", "Q8_0"], (0,)),
    **dict.fromkeys(["Q4_1", "Q5_1", "Q4_K", "Q5_K"], (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def random_blocks(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """The bytes of a matrix [rows, row bytes]: any codes, and scales that are finite numbers."""
    rng = np.random.default_rng(seed)
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (shape[0], shape[1] // size, nbytes), np.uint8)
    for offset in SCALES[kind]:
        scales = rng.normal(0, 0.01, raw.shape[:2]).astype(np.float16)
        raw[:, :, offset : offset + 2] = scales[:, :, None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


KINDS = {
    "u8": (0, "B"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "u64": (10, "Q"),
    "f64": (12, "d"),
}


def pair(key: str | bytes, kind: str, value: Any) -> bytes:
    """A key with a value; kind `raw` takes bytes that begin with the type number."""
    if kind == "raw":
        return string(key) + value
    if kind == "str":
        return string(key) + struct.pack("<I", 8) + string(value)
    number, code = KINDS[kind]
    return string(key) + struct.pack("<I" + code, number, value)


def described(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor description; `dims` fastest first, as in the file."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


LLAMA_PAIRS = {
    "general.architecture": ("str", "llama"),
    "llama.context_length": ("u32", 32),
    "llama.embedding_length": ("u32", 8),
    "llama.block_count": ("u32", 1),
    "llama.feed_forward_length": ("u32", 16),
    "llama.vocab_size": ("u32", 4),
    "llama.attention.head_count": ("u32", 2),
    "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
}


def raw_gguf(
    pairs: dict[str, tuple[str, Any]] | None = None,
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    extra: bytes = b"",
    count: int | None = None,
    tensor_count: int | None = None,
    version: int = 3,
) -> bytes:
    """A GGUF file, however wrong: the pairs of a tiny llama, changed by `pairs` (None removes)."""
    merged = LLAMA_PAIRS | (pairs or {})
    encoded = [pair(key, *value) for key, value in merged.items() if value is not None]
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(encoded) + bool(extra) if count is None else count,
    )
    body = head + b"".join(encoded) + extra + b"".join(tensors)
    return body + bytes(-len(body) % 32) + data


# --- llama2.c ---------------------------------------------------------------------------------------------

LAYER_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


def llama2c_numbers(config: dict[str, Any], vocab_size: int) -> bytes:
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return struct.pack("<7i", *(config[key] for key in keys), vocab_size, config["max_position_embeddings"])


def write_llama2c(
    path: Path, tensors: Tensors, config: dict[str, Any] = CONFIG, *, version: int, group_size: int = 32
) -> Path:
    """The layout of llama2.c's export.py, with float32 (0, 1) or int8 groups (2, 3)."""
    tensors = as_interleaved(tensors, config)
    tied, layers = config["tie_word_embeddings"], range(config["num_hidden_layers"])

    def per_layer(part: str) -> list[np.ndarray]:
        return [
            next(t for n, t in tensors.items() if n.startswith(f"model.layers.{i}.") and part in n)
            for i in layers
        ]

    matrices = [t for part in LAYER_ORDER for t in per_layer(part)]
    head = [] if tied else [tensors["lm_head.weight"]]
    embedding, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    if version == 0:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        tables = np.zeros((2, config["max_position_embeddings"], head_dim // 2), np.float32)
        attention, feed_forward = LAYER_ORDER[:4], LAYER_ORDER[4:]
        parts = [embedding, *per_layer("input_layernorm"), *(t for p in attention for t in per_layer(p))]
        parts += [*per_layer("post_attention_layernorm"), *(t for p in feed_forward for t in per_layer(p))]
        parts += [norm, tables, *head]
        vocab = config["vocab_size"] if tied else -config["vocab_size"]
        path.write_bytes(llama2c_numbers(config, vocab) + b"".join(t.astype("<f4").tobytes() for t in parts))
        return path
    if version == 3:  # KuiperLLama's
        vocab = config["vocab_size"] if tied else -config["vocab_size"]
        body = llama2c_numbers(config, vocab) + struct.pack("<i", group_size)
        body += b"".join(quantized_bytes(matrix, group_size) for matrix in [*matrices, *head])
        norms = [*per_layer("input_layernorm"), *per_layer("post_attention_layernorm"), norm]
        path.write_bytes(body + b"".join(t.astype("<f4").tobytes() for t in [embedding, *norms]))
        return path
    header = struct.pack("<Ii", 0x616B3432, version) + llama2c_numbers(config, config["vocab_size"])
    header += struct.pack("<B", tied) + (struct.pack("<i", group_size) if version == 2 else b"")
    body = header.ljust(256, b"\0")
    norms = [*per_layer("input_layernorm"), *per_layer("post_attention_layernorm"), norm]
    body += b"".join(t.astype("<f4").tobytes() for t in norms)
    for matrix in [embedding, *matrices, *head]:
        body += quantized_bytes(matrix, group_size) if version == 2 else matrix.astype("<f4").tobytes()
    path.write_bytes(body)
    return path


def quantized(matrix: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and float32 scales of the flattened matrix in groups, as export.py's quantize_q80."""
    groups = matrix.astype(np.float32).reshape(-1, group_size)
    scales = np.abs(groups).max(axis=1) / np.float32(127)
    return np.rint(groups / scales[:, None]).astype(np.int8), scales


def quantized_bytes(matrix: np.ndarray, group_size: int) -> bytes:
    values, scales = quantized(matrix, group_size)
    return values.tobytes() + scales.astype("<f4").tobytes()


BFLOAT16 = ml_dtypes.bfloat16
