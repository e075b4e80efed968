"""Exported files of every format, read by other packages and by this one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from export_readers import Llama2cReader, gguf_names, interleaved, read_folder, read_gguf, rotary_heads

from kuiperllm import LLM, SamplingParams, UnsupportedError, export
from kuiperllm.checkpoint import Checkpoint, open_checkpoint
from kuiperllm.checkpoint.writing import safetensors as safetensors_writer
from kuiperllm.quant import QuantTensor
from meta_checkpoints import write_meta
from tiny_models import BASE, random_weights, write_checkpoint

QWEN2 = BASE | {"model_type": "qwen2", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN3 = BASE | {"model_type": "qwen3", "head_dim": 32}
BIASED = BASE | {"attention_bias": True, "mlp_bias": True}
LLAMA3 = BASE | {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LINEAR = BASE | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
YARN = QWEN2 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
YARN_FACTOR = YARN | {"rope_scaling": {**YARN["rope_scaling"], "attention_factor": 1.5}}
FAMILIES = {
    "llama": BASE,
    "tied": BASE | {"tie_word_embeddings": True},
    "biased": BIASED,
    "llama3": LLAMA3,
    "linear": LINEAR,
    "qwen2": QWEN2,
    "yarn": YARN,
    "yarn_factor": YARN_FACTOR,
    "qwen3": QWEN3,
}
LLAMA2C = BASE | {"vocab_size": 264, "bos_token_id": 1, "eos_token_id": 2}

family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def source(folder: Path, config: dict[str, Any], dtype: Any = np.float32) -> Path:
    return write_checkpoint(folder / "source", config, random_weights(config), dtype=dtype)


def floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    loaded = checkpoint.load(name)
    return loaded.dequantize() if isinstance(loaded, QuantTensor) else loaded


def greedy(model: Path) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    return list(LLM(model, device="cpu").generate("hello", params)[0].token_ids)


# --- floating point ---------------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["f32", "f16", "bf16"])
def test_safetensors_keeps_every_bit(tmp_path: Path, config: dict[str, Any], dtype: Any) -> None:
    model = source(tmp_path, config, dtype)
    report = export(model, tmp_path / "out")
    expected_config, expected = read_folder(model)
    found_config, found = read_folder(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].tobytes()) == (tensor.dtype, tensor.tobytes()), name
    assert found_config.pop("torch_dtype") == np.dtype(dtype).name
    assert found_config == expected_config | {"tie_word_embeddings": config["tie_word_embeddings"]}
    assert (report.relative_error, report.max_error, report.notes) == (0.0, 0.0, ())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


@family
def test_gguf_keeps_every_bit(tmp_path: Path, config: dict[str, Any]) -> None:
    model = source(tmp_path, config)
    export(model, tmp_path / "out.gguf")
    weights = random_weights(config)
    keys, found, types = read_gguf(tmp_path / "out.gguf")
    architecture = config["model_type"]
    names = gguf_names(architecture, weights, config["num_hidden_layers"])
    assert set(names.values()) == found.keys() - {"rope_freqs.weight"}
    for name, tensor in weights.items():
        heads = rotary_heads(config, name) if architecture == "llama" else 0
        expected = interleaved(tensor, heads) if heads else tensor
        assert found[names[name]].tobytes() == expected.tobytes(), name
    assert set(types.values()) == {"F32"}
    assert keys["general.architecture"] == architecture
    assert keys["general.file_type"] == 0
    assert keys[f"{architecture}.attention.head_count_kv"] == config["num_key_value_heads"]
    assert keys[f"{architecture}.rope.freq_base"] == config["rope_theta"]
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    with open_checkpoint(model) as before, open_checkpoint(tmp_path / "out.gguf") as after:
        expected_config, found_config = before.config.to_hf(), after.config.to_hf()
        for said_otherwise in ("attention_bias", "eos_token_id", "rope_scaling"):
            expected_config.pop(said_otherwise, None)
            found_config.pop(said_otherwise, None)
        assert found_config == expected_config
        assert before.config.bos_token_id == after.config.bos_token_id
        assert set(before.config.eos_token_ids) <= set(after.config.eos_token_ids)


@family
@pytest.mark.parametrize("out", ["out.gguf", "out"])
def test_the_same_tokens_before_and_after(tmp_path: Path, config: dict[str, Any], out: str) -> None:
    """The whole way round: Hugging Face, GGUF and back, or a folder and back to GGUF."""
    model = source(tmp_path, config | {"vocab_size": 260})  # rows without a token get padding tokens in GGUF
    expected = greedy(model)
    export(model, tmp_path / out)
    assert greedy(tmp_path / out) == expected
    again = tmp_path / ("again" if out == "out.gguf" else "again.gguf")
    export(tmp_path / out, again)
    assert greedy(again) == expected
    llm, first = LLM(again, device="cpu"), LLM(model, device="cpu")
    assert llm.tokenizer.encode("<s>a b\n") == first.tokenizer.encode("<s>a b\n")
    assert llm.tokenizer.chat_template == first.tokenizer.chat_template


def test_folder_and_back_from_gguf_has_a_whole_configuration(tmp_path: Path) -> None:
    model = source(tmp_path, LLAMA3)
    export(model, tmp_path / "m.gguf")
    export(tmp_path / "m.gguf", tmp_path / "out")
    config, _ = read_folder(tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"]
    scaling = config["rope_scaling"]
    expected = dict(
        LLAMA3["rope_scaling"]
    )  # GGUF has the divisors alone; those stay if they differ by rounding
    assert {k: v for k, v in scaling.items() if k != "freq_factors"} == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_other_types(tmp_path: Path, dtype: str) -> None:
    model = source(tmp_path, BIASED)
    report = export(model, tmp_path / "out", dtype=dtype)
    export(model, tmp_path / "out.gguf", dtype=dtype)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    _, found = read_folder(tmp_path / "out")
    keys, of_gguf, types = read_gguf(tmp_path / "out.gguf")
    squares = errors = 0.0
    for name, tensor in random_weights(BIASED).items():
        if tensor.ndim == 1:
            assert found[name].tobytes() == tensor.tobytes()  # norms and biases stay as they are
            continue
        assert found[name].tobytes() == tensor.astype(kind).tobytes(), name
        squares += float((tensor.astype(np.float64) ** 2).sum())
        errors += float(((tensor.astype(np.float64) - tensor.astype(kind).astype(np.float64)) ** 2).sum())
    assert report.relative_error == pytest.approx((errors / squares) ** 0.5, rel=1e-3, abs=1e-9)
    assert keys["general.file_type"] == {"float32": 0, "float16": 1, "bfloat16": 32}[dtype]
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == name
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"
    assert (of_gguf["output.weight"] == random_weights(BIASED)["lm_head.weight"].astype(kind)).all()


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer, "SHARD_BYTES", 100_000)
    model = source(tmp_path, BASE)
    export(model, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 102_000 for name in files)
    _, found = read_folder(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for name, tensor in random_weights(BASE).items():
        assert found[name].tobytes() == tensor.tobytes()
    assert greedy(tmp_path / "out") == greedy(model)


# --- Meta's folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_metas_folder_becomes_any_format(tmp_path: Path, shards: int) -> None:
    config = LLAMA2C | {"vocab_size": 512}  # bytes, and Meta's 256 special tokens
    weights = random_weights(config)
    meta = write_meta(tmp_path / "meta", weights, config, shards=shards)
    lines = [b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
    (meta / "tokenizer.model").write_bytes(b"".join(lines))
    export(meta, tmp_path / "out")
    found_config, found = read_folder(tmp_path / "out")
    assert found_config["model_type"] == "llama"
    assert {name: tensor.tobytes() for name, tensor in found.items()} == {
        name: tensor.tobytes() for name, tensor in weights.items()
    }
    assert LLM(tmp_path / "out", device="cpu").tokenizer.encode("ab") == LLM(
        meta, device="cpu"
    ).tokenizer.encode("ab")
    for version in (0, 1):
        export(meta, tmp_path / "m.bin", version=version, force=True)
        of_file = Llama2cReader(tmp_path / "m.bin", version).weights()
        for name, tensor in weights.items():
            heads = rotary_heads(config, name)
            assert (of_file[name] == (interleaved(tensor, heads) if heads else tensor)).all(), name
    export(meta, tmp_path / "m.gguf", quant="q8")
    assert open_checkpoint(tmp_path / "m.gguf").config.hidden_size == 64


# --- llama2.c ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("version", [0, 1])
def test_llama2c_float32(tmp_path: Path, version: int, tied: bool) -> None:
    config = LLAMA2C | {"tie_word_embeddings": tied}
    report = export(source(tmp_path, config), tmp_path / "m.bin", version=version)
    reader = Llama2cReader(tmp_path / "m.bin", version)
    assert reader.numbers == [64, 96, 2, 4, 2, 264 if tied or version else -264, 256]
    assert reader.shared == tied
    found = reader.weights()
    if version == 0:
        angles = np.outer(np.arange(256), 10000.0 ** (-np.arange(0, 16, 2) / 16))
        np.testing.assert_allclose(found.pop("tables"), [np.cos(angles), np.sin(angles)], atol=2e-5)
    weights = random_weights(config)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        heads = rotary_heads(config, name)
        assert found[name].tobytes() == (interleaved(tensor, heads) if heads else tensor).tobytes(), name
    assert "no tokenizer.bin: llama2.c cannot work with a tokenizer" in report.notes[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("version", "group_size"), [(2, 32), (2, 16), (3, 32), (3, 64), (3, 256)])
def test_llama2c_int8(tmp_path: Path, version: int, group_size: int, tied: bool) -> None:
    """The int8 values of a group are its weights by max / 127, rounded to the nearest."""
    config = LLAMA2C | {"tie_word_embeddings": tied}
    export(source(tmp_path, config), tmp_path / "m.bin", version=version, group_size=group_size)
    reader = Llama2cReader(tmp_path / "m.bin", version)
    assert (reader.group_size, reader.shared) == (group_size, tied)
    found, weights = reader.weights(), random_weights(config)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        if tensor.ndim == 1 or (version == 3 and name == "model.embed_tokens.weight"):
            assert found[name].tobytes() == tensor.tobytes()
            continue
        heads = rotary_heads(config, name)
        groups = (interleaved(tensor, heads) if heads else tensor).reshape(-1, group_size)
        scales = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
        expected = (np.rint(groups / scales) * scales).reshape(tensor.shape)
        assert (found[name] == expected).all(), name
    with open_checkpoint(tmp_path / "m.bin") as checkpoint:
        assert set(checkpoint.tensors) == set(weights)
        for name in weights:
            heads = rotary_heads(config, name)
            loaded = floats(checkpoint, name)
            assert ((interleaved(loaded, heads) if heads else loaded) == found[name]).all(), name


def test_an_output_projection_that_repeats_the_embedding_is_shared(tmp_path: Path) -> None:
    weights = random_weights(LLAMA2C)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    model = write_checkpoint(tmp_path / "source", LLAMA2C, weights)
    export(model, tmp_path / "m.bin", version=1)
    assert Llama2cReader(tmp_path / "m.bin", 1).shared
    assert "lm_head.weight" not in Llama2cReader(tmp_path / "m.bin", 1).weights()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_bias": True}, r"biases \(model\.layers\.0\.self_attn\.q_proj\.bias\)"),
        ({"model_type": "qwen3"}, "the architecture qwen3"),
        ({"rms_norm_eps": 1e-6}, "a norm epsilon of 1e-06"),
        ({"rope_theta": 500000.0}, "a rope base of 500000"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope scaling \(linear\)"),
        ({"head_dim": 32}, "heads of 32 that do not make up 64 channels"),
        ({"bos_token_id": 256}, "texts that begin with token 256"),
        ({"eos_token_id": [5, 6]}, "texts that end with token 5"),
    ],
)
def test_llama2c_refuses_what_it_cannot_say(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    model = source(tmp_path, LLAMA2C | change)
    with pytest.raises(UnsupportedError, match=rf"the format llama2c cannot hold {reason}"):
        export(model, tmp_path / "m.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.shared
def test_stories260k(tmp_path: Path, shared: Path) -> None:
    """Version 0 and version 1 of one model, each made from the other; tables apart, byte for byte."""
    stories = shared / "models" / "stories260K"
    v0, v1 = stories / "stories260K.bin", stories / "stories260K_v1.bin"
    binary = stories / "tok512.bin"
    for origin in (v0, v1, stories / "stories260Ktok512.gguf"):
        export(origin, tmp_path / "v1.bin", version=1, tokenizer=binary, force=True)
        if origin.suffix == ".gguf":  # states another length of context
            assert (tmp_path / "v1.bin").read_bytes()[36:] == v1.read_bytes()[36:]
            continue
        assert (tmp_path / "v1.bin").read_bytes() == v1.read_bytes()
        export(origin, tmp_path / "v0.bin", version=0, tokenizer=binary, force=True)
        assert (tmp_path / "tokenizer.bin").read_bytes() == binary.read_bytes()
        tables = 2 * 512 * 4 * 4
        found, expected = (tmp_path / "v0.bin").read_bytes(), v0.read_bytes()
        assert found[:-tables] == expected[:-tables]
        ours, theirs = (np.frombuffer(data[-tables:], np.float32) for data in (found, expected))
        np.testing.assert_array_max_ulp(ours, theirs, 1)
    before = open_checkpoint(stories / "stories260Ktok512.gguf").config
    for out in ("folder", "m.gguf"):
        export(v0, tmp_path / out, tokenizer=binary)
        after = open_checkpoint(tmp_path / out).config
        assert (after.hidden_size, after.head_dim, after.rms_norm_eps) == (64, 8, before.rms_norm_eps)
    texts = {
        LLM(model, tokenizer=None if model.parent == tmp_path else binary, device="cpu")
        .generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=100))[0]
        .text
        for model in (v0, tmp_path / "v0.bin", tmp_path / "v1.bin", tmp_path / "folder", tmp_path / "m.gguf")
    }
    assert len(texts) == 1
