"""Write a GGUF file with random weights in the shape of a Hugging Face config, for timing.

    python benchmarks/random_gguf.py benchmarks/configs/llama-3.2-1b.json Q4_K_M model.gguf

The file holds what a converted checkpoint of that shape and type holds: norms and biases in float32,
`rope_freqs` where the config scales rope as Llama 3 does, and matrices, the (tied) embedding included, in the
one type; of Q4_K_M, in the mixture that llama.cpp's quantizer makes. Weights are spread like freshly
initialised ones (standard deviation 0.02), so activations stay finite. There is no vocabulary
(`tokenizer.ggml.model` = `no_vocab`): token ids are all that is fed and read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

STD = 0.02
FILE_TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}
SUPER_BLOCK = 256
WITHOUT_SUPER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What llama.cpp takes instead where 256 does not divide the columns."""


@dataclass(frozen=True)
class Block:
    """How a block of a quantized type is made of random bytes.

    `scales` are where float16 numbers lie, and their sizes in multiples of a scale; `std` is the standard
    deviation of the weights if that scale is 1.
    """

    scales: tuple[tuple[int, float], ...]
    std: float


BLOCKS = {
    "Q8_0": Block(((0, 1.0),), 73.9),
    "Q4_0": Block(((0, 1.0),), 4.61),
    "Q5_0": Block(((0, 1.0),), 9.23),
    # 6-bit multipliers m and n of scale and minimum: d m c - 7.5 d n, so that the mean is 0
    "Q4_K": Block(((0, 1.0), (2, 7.5)), 258.0),
    "Q6_K": Block(((208, 1.0),), 1366.0),
}


@dataclass(frozen=True)
class Spec:
    """One tensor: GGUF name, shape [rows, columns] (or [size]), whether it is kept in float32, its layer."""

    name: str
    shape: tuple[int, ...]
    float32: bool = False
    layer: int = 0


def tensor_specs(config: dict[str, Any]) -> Iterator[Spec]:
    """Every tensor of the model, in the order of the file."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    yield Spec("token_embd.weight", (config["vocab_size"], hidden))
    yield Spec("output_norm.weight", (hidden,), float32=True)
    if not config.get("tie_word_embeddings", False):
        yield Spec("output.weight", (config["vocab_size"], hidden))
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        yield Spec("rope_freqs.weight", (head_dim // 2,), float32=True)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"blk.{layer}."
        yield Spec(prefix + "attn_norm.weight", (hidden,), float32=True)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            yield Spec(f"{prefix}attn_{name}.weight", (size, hidden), layer=layer)
            if config["model_type"] == "qwen2":
                yield Spec(f"{prefix}attn_{name}.bias", (size,), float32=True)
        yield Spec(prefix + "attn_output.weight", (hidden, q_size))
        yield Spec(prefix + "ffn_norm.weight", (hidden,), float32=True)
        yield Spec(prefix + "ffn_gate.weight", (ffn, hidden))
        yield Spec(prefix + "ffn_up.weight", (ffn, hidden))
        yield Spec(prefix + "ffn_down.weight", (hidden, ffn), layer=layer)


def matrix_type(spec: Spec, kind: str, config: dict[str, Any]) -> str:
    """The type of a matrix in a file of some kind.

    Of Q4_K_M, the output projection, and the values' and the last projection of half of the layers (the first
    and the last eighth, and each third between) are Q6_K, the rest Q4_K.
    """
    if kind != "Q4_K_M":
        return kind
    eighth, layers = config["num_hidden_layers"] // 8, config["num_hidden_layers"]
    outer = spec.layer < eighth or spec.layer >= 7 * layers // 8
    more = outer or (spec.layer - eighth) % 3 == 2
    output = "token_embd" if config.get("tie_word_embeddings", False) else "output.weight"
    is_output = spec.name.startswith(output)
    wanted = "Q6_K" if is_output or (more and ("attn_v" in spec.name or "ffn_down" in spec.name)) else "Q4_K"
    return WITHOUT_SUPER_BLOCKS[wanted] if spec.shape[1] % SUPER_BLOCK else wanted


def random_matrix(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Random weights of a type, as GGUF stores them: [rows, elements], or [rows, bytes] for all but F16."""
    rows, columns = shape
    if kind in BLOCKS:
        block, (size, block_bytes) = BLOCKS[kind], gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        blocks = rng.integers(0, 256, (rows * columns // size, block_bytes), np.uint8)
        for at, multiple in block.scales:
            scales = rng.uniform(0.5, 1.5, len(blocks)) * (STD / block.std * multiple)
            blocks[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
        return blocks.reshape(rows, -1)
    weights = rng.standard_normal(shape, np.float32) * np.float32(STD)
    if kind == "F16":
        return weights.astype(np.float16)
    return (weights.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(rows, -1)


def random_vector(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """Biases around 0; norm weights and rope factors of 1."""
    if spec.name.endswith(".bias"):
        return rng.standard_normal(spec.shape, np.float32) * np.float32(STD)
    return np.ones(spec.shape, np.float32)


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], kind: str) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")


def write_random_gguf(config: dict[str, Any], kind: str, path: Path, seed: int = 0) -> None:
    """Write the model tensor by tensor, so that one tensor at a time is in memory.

    The file appears under its name only when it is whole.
    """
    if config["model_type"] not in ("llama", "qwen2"):
        raise SystemExit(f"model_type {config['model_type']!r} is not supported; supported: llama, qwen2")
    rng = np.random.default_rng(seed)
    types = gguf.GGMLQuantizationType
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, config["model_type"])
    add_metadata(writer, config, kind)
    specs = list(tensor_specs(config))
    for spec in specs:
        elements = int(np.prod(spec.shape))
        if spec.float32:
            writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), elements * 4, types.F32)
        else:
            tensor_type = types[matrix_type(spec, kind, config)]
            block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
            nbytes = elements // block * block_bytes
            writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float16), nbytes, tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for spec in specs:
        if spec.float32:
            writer.write_tensor_data(random_vector(spec, rng))
        else:
            writer.write_tensor_data(random_matrix(spec.shape, matrix_type(spec, kind, config), rng))
    writer.close()
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file with random weights.")
    parser.add_argument("config", type=Path, help="config.json of Hugging Face form")
    parser.add_argument("kind", choices=FILE_TYPES, help="type of the matrices, or their mixture")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    write_random_gguf(json.loads(args.config.read_text()), args.kind, args.output)


if __name__ == "__main__":
    main()
