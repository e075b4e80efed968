"""Readers of exported files that share nothing with the writers: other packages, and plain restatements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from gguf.quants import dequantize

Arrays = dict[str, np.ndarray]


def read_folder(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """config.json and the tensors of all shards, by the safetensors package."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
    arrays: Arrays = {}
    for name in names or ["model.safetensors"]:
        arrays |= safetensors.numpy.load_file(folder / name)
    return json.loads((folder / "config.json").read_text()), arrays


def read_gguf(path: Path) -> tuple[dict[str, Any], Arrays, dict[str, str]]:
    """Keys, tensors dequantized to float32, and their types, by the gguf package."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: np.array(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return keys, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def gguf_names(architecture: str, names: Mapping[str, Any], layers: int) -> dict[str, str]:
    """llama.cpp's name for each Hugging Face name, as the gguf package has them."""
    (number,) = (k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    table = gguf.get_tensor_name_map(number, layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    assert None not in found.values()
    return found  # type: ignore[return-value]


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rows in the order of Meta's files: channel i and channel i + d/2 become neighbours."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def rotary_heads(config: Mapping[str, Any], name: str) -> int:
    """Heads of a projection whose rows Meta's files have in another order; 0 for others."""
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".k_proj." in name else 0


# --- llama2.c ---------------------------------------------------------------------------------------------


class Llama2cReader:
    """The numbers of a llama2.c file of any version, in the order in which run.c and runq.c take them."""

    def __init__(self, path: Path, version: int) -> None:
        self.raw = path.read_bytes()
        self.position = 0
        self.version = version
        if version in (1, 2):
            assert self.integers(2) == [0x616B3432, version]
        self.numbers = self.integers(7)
        self.group_size = self.integers(1)[0] if version == 3 else 0
        self.shared = self.numbers[5] > 0
        if version in (1, 2):
            self.shared = self.take(1, np.uint8)[0] == 1
            if version == 2:
                self.group_size = self.integers(1)[0]
            assert not any(self.raw[self.position : 256])
            self.position = 256

    def take(self, count: int, dtype: Any) -> np.ndarray:
        taken = np.frombuffer(self.raw, dtype, count, self.position)
        self.position += taken.nbytes
        return taken

    def integers(self, count: int) -> list[int]:
        return self.take(count, "<i4").tolist()

    def floats(self, *shape: int) -> np.ndarray:
        return self.take(int(np.prod(shape)), "<f4").reshape(shape)

    def matrix(self, *shape: int) -> np.ndarray:
        """float32, or int8 groups of the flattened matrix."""
        if not self.group_size:
            return self.floats(*shape)
        count = int(np.prod(shape))
        values = self.take(count, np.int8).reshape(-1, self.group_size)
        scales = self.take(count // self.group_size, "<f4")
        return (values.astype(np.float32) * scales[:, None]).reshape(shape)

    def weights(self) -> Arrays:
        dim, hidden, layers, heads, kv_heads, vocab, positions = self.numbers
        vocab = abs(vocab)
        kv = dim // heads * kv_heads
        shapes = {
            "self_attn.q_proj": (dim, dim),
            "self_attn.k_proj": (kv, dim),
            "self_attn.v_proj": (kv, dim),
            "self_attn.o_proj": (dim, dim),
            "mlp.gate_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden),
            "mlp.up_proj": (hidden, dim),
        }
        attention, feed_forward = list(shapes)[:4], list(shapes)[4:]
        found: Arrays = {}

        def matrices(parts: list[str]) -> None:
            for part in parts:
                for i in range(layers):
                    found[f"model.layers.{i}.{part}.weight"] = self.matrix(*shapes[part])

        def norms(part: str) -> None:
            for i in range(layers):
                found[f"model.layers.{i}.{part}.weight"] = self.floats(dim)

        if self.version == 0:
            found["model.embed_tokens.weight"] = self.floats(vocab, dim)
            norms("input_layernorm")
            matrices(attention)
            norms("post_attention_layernorm")
            matrices(feed_forward)
            found["model.norm.weight"] = self.floats(dim)
            found["tables"] = self.floats(2, positions, dim // heads // 2)
        elif self.version == 3:
            matrices(attention + feed_forward)
        else:
            norms("input_layernorm")
            norms("post_attention_layernorm")
            found["model.norm.weight"] = self.floats(dim)
            found["model.embed_tokens.weight"] = self.matrix(vocab, dim)
            matrices(attention + feed_forward)
        if not self.shared:
            found["lm_head.weight"] = self.matrix(vocab, dim)
        if self.version == 3:
            found["model.embed_tokens.weight"] = self.floats(vocab, dim)
            norms("input_layernorm")
            norms("post_attention_layernorm")
            found["model.norm.weight"] = self.floats(dim)
        assert self.position == len(self.raw)
        return found
