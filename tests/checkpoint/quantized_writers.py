"""Quantized safetensors as other programs write them, packed code by code as the formats are described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoint_writers import BFLOAT16, CONFIG, make_tensors, raw_safetensors

from kuiperllm.checkpoint.safetensors_file import DTYPES

E4M3 = ml_dtypes.float8_e4m3fn
WIDE = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file; the package itself knows no float8."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(raw_safetensors(text + b" " * (-len(text) % 8), data))


def write_quantized(
    folder: Path,
    parts: dict[str, dict[str, np.ndarray]],
    quantization: dict[str, Any] | None,
    config: dict[str, Any] = WIDE,
) -> Path:
    """A folder whose modules `parts` are made of other tensors than `weight`."""
    tensors = make_tensors(config, np.float16)
    for module, arrays in parts.items():
        tensors.pop(f"{module}.weight", None)
        tensors |= {f"{module}.{suffix}": array for suffix, array in arrays.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if quantization is not None:
        config = config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / "model.safetensors", tensors)
    return folder


def shape_of(module: str, config: dict[str, Any] = WIDE) -> tuple[int, int]:
    shape = config["intermediate_size"], config["hidden_size"]
    return shape[::-1] if module == DOWN else shape


def pack(codes: list[int], bits: int) -> int:
    """Codes of a word, the first at the lowest bits; as int32."""
    word = sum(int(code) << bits * i for i, code in enumerate(codes))
    return word - (1 << 32) if word >= 1 << 31 else word


def awq(rng: np.random.Generator, shape: tuple[int, int], group: int) -> dict[str, np.ndarray]:
    """Random codes, scales and zero points of a matrix [N, K], as AutoAWQ packs them."""
    rows, columns = shape

    def packed(codes: np.ndarray) -> np.ndarray:
        out = np.empty((len(codes), rows // 8), np.int32)
        for i, row in enumerate(codes):
            for j in range(rows // 8):
                out[i, j] = pack([row[8 * j + c] for c in AWQ_COLUMNS], 4)
        return out

    groups = columns // group
    return {
        "qweight": packed(rng.integers(0, 16, (columns, rows))),
        "qzeros": packed(rng.integers(0, 16, (groups, rows))),
        "scales": rng.normal(0, 0.01, (groups, rows)).astype(np.float16),
    }


def read_awq(parts: dict[str, np.ndarray], group: int) -> np.ndarray:
    """The matrix, element by element."""
    columns, eighths = parts["qweight"].shape
    out = np.empty((8 * eighths, columns), np.float32)
    for n in range(8 * eighths):
        shift = 4 * AWQ_COLUMNS.index(n % 8)
        for k in range(columns):
            code = int(parts["qweight"][k, n // 8]) >> shift & 15
            zero = int(parts["qzeros"][k // group, n // 8]) >> shift & 15
            out[n, k] = np.float32(parts["scales"][k // group, n]) * np.float32(code - zero)
    return out


def gptq(
    rng: np.random.Generator, shape: tuple[int, int], group: int, bits: int = 4, *, act_order: bool = False
) -> dict[str, np.ndarray]:
    """Random codes, scales, zero points and groups of a matrix [N, K], as AutoGPTQ packs them."""
    rows, columns = shape
    per_word, groups = 32 // bits, columns // group
    codes = rng.integers(0, 1 << bits, (columns, rows))
    stored_zeros = rng.integers(0, 1 << bits, (groups, rows))
    weight = np.empty((columns // per_word, rows), np.int32)
    for i in range(len(weight)):
        for n in range(rows):
            weight[i, n] = pack(codes[per_word * i : per_word * (i + 1), n], bits)
    zeros = np.empty((groups, rows // per_word), np.int32)
    for i in range(groups):
        for j in range(rows // per_word):
            zeros[i, j] = pack(stored_zeros[i, per_word * j : per_word * (j + 1)], bits)
    of_column = np.arange(columns) // group
    return {
        "qweight": weight,
        "qzeros": zeros,
        "scales": rng.normal(0, 0.01, (groups, rows)).astype(np.float16),
        "g_idx": (rng.permutation(of_column) if act_order else of_column).astype(np.int32),
    }


def read_gptq(parts: dict[str, np.ndarray], bits: int = 4, *, plus_one: bool = True) -> np.ndarray:
    """The matrix, element by element."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    height, rows = parts["qweight"].shape
    out = np.empty((rows, height * per_word), np.float32)
    for n in range(rows):
        for k in range(height * per_word):
            g = parts["g_idx"][k]
            code = int(parts["qweight"][k // per_word, n]) >> bits * (k % per_word) & mask
            zero = int(parts["qzeros"][g, n // per_word]) >> bits * (n % per_word) & mask
            zero = (zero + 1) & mask if plus_one else zero
            out[n, k] = np.float32(parts["scales"][g, n]) * np.float32(code - zero)
    return out


def packed_int(
    rng: np.random.Generator,
    shape: tuple[int, int],
    group: int,
    bits: int,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    scales: Any = BFLOAT16,
) -> dict[str, np.ndarray]:
    """A matrix as compressed-tensors packs it."""
    rows, columns = shape
    per_word, groups, half = 32 // bits, columns // group, 1 << bits - 1
    values = rng.integers(-half, half, (rows, columns))
    parts = {
        "weight_packed": np.array(
            [
                [pack(values[n, i : i + per_word] + half, bits) for i in range(0, columns, per_word)]
                for n in range(rows)
            ],
            np.int32,
        ),
        "weight_scale": rng.normal(0, 0.01, (rows, groups)).astype(scales),
        "weight_shape": np.array([rows, columns], np.int64),
    }
    if not symmetric:
        zeros = rng.integers(-half, half, (rows, groups))
        parts["weight_zero_point"] = np.array(
            [
                [pack(zeros[n : n + per_word, g] + half, bits) for g in range(groups)]
                for n in range(0, rows, per_word)
            ],
            np.int32,
        )
    if act_order:
        parts["weight_g_idx"] = rng.permutation(np.arange(columns) // group).astype(np.int32)
    return parts


def read_packed_int(parts: dict[str, np.ndarray], group: int, bits: int) -> np.ndarray:
    """The matrix, element by element."""
    per_word, mask, half = 32 // bits, (1 << bits) - 1, 1 << bits - 1
    rows, columns = parts["weight_shape"]
    out = np.empty((rows, columns), np.float32)
    for n in range(rows):
        for k in range(columns):
            g = parts["weight_g_idx"][k] if "weight_g_idx" in parts else k // group
            value = (int(parts["weight_packed"][n, k // per_word]) >> bits * (k % per_word) & mask) - half
            if "weight_zero_point" in parts:
                word = int(parts["weight_zero_point"][n // per_word, g])
                value -= (word >> bits * (n % per_word) & mask) - half
            out[n, k] = np.float32(parts["weight_scale"][n, g]) * np.float32(value)
    return out


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Every e4m3 number but NaN."""
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[codes & 127 == 127] = 0
    return codes.view(E4M3)
