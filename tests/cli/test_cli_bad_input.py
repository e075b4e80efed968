"""What is wrong is said in one line, soon, with little memory, and leaves no files behind.

Each case runs in a process of its own, whose address space and processor time are bounded.
"""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from cli_result import Run
from small_model import tensors, write_model

ADDRESS_SPACE_BYTES = 3 << 30  # the libraries alone map about one
CPU_SECONDS = 20
DEMO = Path(str(files("kuiperllm") / "data" / "demo.gguf"))

Make = Callable[[Path], tuple[str, ...]]


def bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def model(folder: Path, **changes: object) -> Path:
    return write_model(folder / "m", **changes)  # type: ignore[arg-type]


def safetensors_cut(folder: Path) -> tuple[str, ...]:
    path = model(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "-m", str(path.parent)


def safetensors_of_noise(folder: Path) -> tuple[str, ...]:
    path = model(folder) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:60] = bytes(range(40))
    path.write_bytes(data)
    return "-m", str(path.parent)


def safetensors_with_a_huge_header(folder: Path) -> tuple[str, ...]:
    path = model(folder) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])
    return "-m", str(path.parent)


def weights_of_another_shape(folder: Path) -> tuple[str, ...]:
    return "-m", str(model(folder, intermediate_size=128))


def tensor_missing(folder: Path) -> tuple[str, ...]:
    path = model(folder)
    arrays = tensors()
    del arrays["model.layers.1.mlp.up_proj.weight"]
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    return "-m", str(path)


def shard_missing(folder: Path) -> tuple[str, ...]:
    path = model(folder)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(tensors(), "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return "-m", str(path)


def unknown_architecture(folder: Path) -> tuple[str, ...]:
    return "-m", str(model(folder, model_type="mamba"))


def endless_layers(folder: Path) -> tuple[str, ...]:
    return "-m", str(model(folder, num_hidden_layers=1 << 40))


def no_tokenizer(folder: Path) -> tuple[str, ...]:
    path = model(folder)
    (path / "tokenizer.json").unlink()
    return "-m", str(path)


def broken_tokenizer(folder: Path) -> tuple[str, ...]:
    path = model(folder)
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text[: len(text) // 2])
    return "-m", str(path)


def gguf_cut(folder: Path) -> tuple[str, ...]:
    (folder / "cut.gguf").write_bytes(DEMO.read_bytes()[:-100_000])
    return "-m", str(folder / "cut.gguf")


def gguf_of_43_bytes(folder: Path) -> tuple[str, ...]:
    """An array of 2^63 bytes, on which the reader of gguf 0.19 hangs."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 3) + b"abc"
    data = header + struct.pack("<IIQ", 9, 0, 1 << 63)
    assert len(data) in (43, 51)
    (folder / "x.gguf").write_bytes(data)
    return "-m", str(folder / "x.gguf")


def gguf_of_unknown_quantization(folder: Path) -> tuple[str, ...]:
    path = folder / "iq2.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(
        "token_embd.weight", np.zeros((4, 66), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "-m", str(path)


def llama2c_cut(folder: Path) -> tuple[str, ...]:
    path = folder / "model.bin"
    path.write_bytes(struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512) + bytes(1000))
    return "-m", str(path)


def pickle(folder: Path) -> tuple[str, ...]:
    (folder / "model.bin").write_bytes(b"\x80\x04" + bytes(100))
    return "-m", str(folder / "model.bin")


def torch_cut(folder: Path) -> tuple[str, ...]:
    (folder / "model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    return "-m", str(folder / "model.bin")


def noise(folder: Path) -> tuple[str, ...]:
    (folder / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    return "-m", str(folder / "noise")


def empty(folder: Path) -> tuple[str, ...]:
    (folder / "empty").touch()
    return "-m", str(folder / "empty")


def too_little_memory(folder: Path) -> tuple[str, ...]:
    return "-m", str(model(folder, max_position_embeddings=1 << 30)), "--max-model-len", str(1 << 30)


def cannot_exist(folder: Path) -> tuple[str, ...]:
    return "-m", str(folder / "nothing.gguf")


def of_words(*arguments: str) -> Make:
    return lambda folder: arguments


CASES: dict[str, tuple[Make, int, str]] = {
    "safetensors cut off": (safetensors_cut, 1, "truncated|beyond the end|more than the file"),
    "safetensors of noise": (safetensors_of_noise, 1, "model.safetensors"),
    "safetensors header of 2^62": (safetensors_with_a_huge_header, 1, "model.safetensors"),
    "shapes contradict the config": (weights_of_another_shape, 1, "[96, 64]|[128, 64]"),
    "tensor missing": (tensor_missing, 1, "model.layers.1.mlp.up_proj.weight"),
    "shard missing": (shard_missing, 1, "model-00002-of-00002.safetensors"),
    "unknown architecture": (unknown_architecture, 1, "supported: llama, qwen2, qwen3"),
    "2^40 layers": (endless_layers, 1, "num_hidden_layers"),
    "no tokenizer": (no_tokenizer, 1, "no tokenizer"),
    "broken tokenizer": (broken_tokenizer, 1, "tokenizer.json"),
    "GGUF cut off": (gguf_cut, 1, "truncated"),
    "GGUF with an array of 2^63": (gguf_of_43_bytes, 1, "claims 9223372036854775808 items"),
    "GGUF of unknown quantization": (gguf_of_unknown_quantization, 1, "supported: F32, F16, Q4_0"),
    "llama2.c cut off": (llama2c_cut, 1, "model.bin"),
    "pickle": (pickle, 1, "never loaded"),
    "file of torch.save cut off": (torch_cut, 1, "has no directory at its end, so it is truncated"),
    "noise": (noise, 1, "supported: safetensors, GGUF, llama2.c .bin"),
    "empty file": (empty, 1, "empty"),
    "no such file": (cannot_exist, 1, "there is no such file"),
    "too little memory": (too_little_memory, 1, "needs 512.00 GiB, has "),
    "unknown quant": (of_words("--quant", "q3"), 2, "choose one of none, q8"),
    "unknown dtype": (of_words("--dtype", "int4"), 2, "choose one of auto"),
    "unknown device": (of_words("--device", "tpu"), 1, 'devices are "cpu"'),
    "no such GPU": (of_words("--device", "cuda:99"), 1, 'device "cuda:99": '),
    "prompt too long": (
        of_words("--max-model-len", "4", "one two three four five"),
        2,
        "10 tokens",
    ),
    "temperature below 0": (of_words("--temperature", "-1"), 2, "allowed: 0 to 100"),
    "temperature NaN": (of_words("--temperature", "nan"), 2, "allowed: 0 to 100"),
    "top-p of 0": (of_words("--top-p", "0"), 2, "top_p=0.0"),
    "top-k below 0": (of_words("--top-k", "-1"), 2, "top_k=-1"),
    "min-p above 1": (of_words("--min-p", "1.5"), 2, "min_p=1.5"),
    "penalty of 0": (of_words("--repetition-penalty", "0"), 2, "repetition_penalty=0.0"),
    "no tokens": (of_words("--max-tokens", "0"), 2, "max_tokens=0"),
    "more at least than at most": (of_words("--min-tokens", "9", "--max-tokens", "3"), 2, "min_tokens=9"),
    "empty stop": (of_words("--stop", ""), 2, "stop="),
    "seed below 0": (of_words("--seed", "-1"), 2, "seed=-1"),
    "threads 0": (of_words("--threads", "0"), 2, "threads must be"),
    "no number": (of_words("--temperature", "warm"), 2, "--temperature"),
    "unknown option": (of_words("--tempreature", "1"), 2, "No such option"),
    "tokens out of range": (of_words("tokenize", "--decode", "70000"), 1, "token id 70000 is outside"),
    "unknown command": (of_words("generrate"), 2, "generrate"),
    "bench without a config file": (
        of_words("bench", "--random-weights", "--config", "nowhere.json"),
        1,
        "nowhere.json",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(process: Run, tmp_path: Path, name: str) -> None:
    make, code, message = CASES[name]
    arguments = make(tmp_path)
    is_option = arguments[0].startswith("-")
    prompt = () if "one two" in arguments[-1] else ("hi",)
    before = sorted(tmp_path.rglob("*"))
    started = time.monotonic()
    result = process(
        *(("generate", *arguments, *prompt) if is_option else arguments), preexec_fn=bounded, cwd=tmp_path
    )
    assert time.monotonic() - started < 60
    assert result.code == code, result.err
    line = result.refused()
    assert any(part in line for part in message.split("|")), line
    assert sorted(tmp_path.rglob("*")) == before
