"""GGUF files written by the `gguf` package, read back under Hugging Face names."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from checkpoint_writers import (
    CONFIG,
    SCALES,
    as_interleaved,
    gguf_name,
    make_tensors,
    random_blocks,
    write_gguf,
)
from gguf.quants import dequantize, quantize

from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.checkpoint.check import BadTensor, find_bad_tensors
from kuiperllm.checkpoint.gguf_file import GgufFile
from kuiperllm.checkpoint.rotary import half_split_order
from kuiperllm.errors import CheckpointError
from kuiperllm.quant import QuantTensor


def test_half_split_order_of_one_small_head():
    assert half_split_order(1, 8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert half_split_order(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("arch", "bias"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False)]
)
def test_float32_comes_back_bit_equal(tmp_path, arch, bias):
    tensors = make_tensors(bias=bias)
    with open_checkpoint(write_gguf(tmp_path / "m", tensors, arch=arch)) as checkpoint:
        assert checkpoint.format == "gguf"
        assert set(checkpoint.tensors) == set(tensors)
        for name, expected in tensors.items():
            loaded = checkpoint.load(name)
            assert loaded.dtype == np.float32
            assert not loaded.flags.writeable
            assert loaded.shape == checkpoint.tensors[name].shape == expected.shape
            assert loaded.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("matrices", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_other_types_equal_the_gguf_package_bit_for_bit(tmp_path, matrices, arch):
    tensors, kind = make_tensors(), gguf.GGMLQuantizationType[matrices]
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m", tensors, arch=arch, matrices=matrices))
    for name, tensor in tensors.items():
        loaded = checkpoint.load(name)
        # Quantization is by rows, so the truth does not depend on the order of rows.
        expected = dequantize(quantize(tensor, kind), kind) if tensor.ndim == 2 else tensor
        if matrices == "Q8_0" and tensor.ndim == 2:
            assert isinstance(loaded, QuantTensor)
            assert (loaded.group_size, loaded.shape, loaded.nbytes) == (
                32,
                tensor.shape,
                checkpoint.tensors[name].nbytes,
            )
            assert checkpoint.tensors[name].dtype == "Q8_0"
            loaded = loaded.dequantize()
        assert loaded.astype(np.float32).tobytes() == expected.astype(np.float32).tobytes(), name


# The types of the parts of a layer, roughly as in the files that people download.
MIXES = {
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
    "Q3_K_M": ("Q3_K", "Q5_K", "Q6_K"),
    "Q2_K": ("Q2_K", "Q3_K", "Q6_K"),
    "Q6_K": ("Q6_K", "Q6_K", "Q6_K"),
    "Q5_0": ("Q5_0", "Q5_1", "Q8_0"),
    "Q4_0": ("Q4_0", "Q4_1", "Q6_K"),
}
WIDE = CONFIG | {"hidden_size": 256, "intermediate_size": 512}


def mixed(mix):
    """Tensors, of which matrices are bytes, and their types."""
    usual, better, head = MIXES[mix]
    tensors, kinds = make_tensors(WIDE), {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim == 2:
            is_better = "v_proj" in name or "down_proj" in name
            kinds[name] = head if "lm_head" in name else better if is_better else usual
            tensors[name] = random_blocks(kinds[name], tensor.shape, seed)
    return tensors, kinds


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_mixed_files_equal_the_gguf_package_bit_for_bit(tmp_path, mix, arch):
    tensors, kinds = mixed(mix)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m", tensors, WIDE, arch=arch, kinds=kinds))
    assert set(checkpoint.tensors) == set(tensors)
    for name, kind in kinds.items():
        info, loaded = checkpoint.tensors[name], checkpoint.load(name)
        assert (info.dtype, info.nbytes, info.scheme) == (kind, tensors[name].nbytes, loaded.scheme)
        expected = dequantize(tensors[name], gguf.GGMLQuantizationType[kind])
        assert loaded.shape == info.shape == expected.shape
        assert loaded.dequantize().tobytes() == expected.tobytes(), name
        assert not loaded.codes.data.flags.writeable
        if arch == "qwen2" or ("k_proj" not in name and "q_proj" not in name):
            assert np.shares_memory(loaded.codes.data, checkpoint.load(name).codes.data), name


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_scales_are_one_line_at_load_and_counted_by_the_check(tmp_path, kind, bad):
    tensors, name = make_tensors(WIDE), "model.layers.1.mlp.up_proj.weight"
    tensors[name] = raw = random_blocks(kind, (512, 256))
    for offset in SCALES[kind]:
        raw[7, offset : offset + 2] = np.array([bad], np.float16).view(np.uint8)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m", tensors, WIDE, kinds={name: kind}))
    with pytest.raises(CheckpointError, match=rf"tensor {name} has scales that are NaN or infinite"):
        checkpoint.load(name)
    count = len(SCALES[kind])
    of_kind = (count, 0) if np.isnan(bad) else (0, count)
    assert find_bad_tensors(checkpoint) == [BadTensor(name, *of_kind)]


def test_scales_of_zero_are_legal(tmp_path):
    tensors, name = make_tensors(WIDE), "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.zeros((512, 144), np.uint8)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m", tensors, WIDE, kinds={name: "Q4_K"}))
    assert not checkpoint.load(name).dequantize().any()
    assert find_bad_tensors(checkpoint) == []


def test_plain_tensors_are_views(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m", make_tensors()))
    assert np.shares_memory(checkpoint.load("lm_head.weight"), checkpoint.load("lm_head.weight"))


def test_configuration(tmp_path):
    config = open_checkpoint(write_gguf(tmp_path / "m", make_tensors())).config
    assert config.model_type == "llama"
    assert config.vocab_size == 20
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 96, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert config.max_position_embeddings == 32
    assert config.rms_norm_eps == 1e-5  # float32 in the file, the decimal that was meant here
    assert config.rope_theta == 10000.0
    assert config.rope_scaling.rope_type == "default"
    assert not config.tie_word_embeddings
    assert (config.attention_bias, config.mlp_bias) == (False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_configuration_of_the_less_usual_kind(tmp_path):
    def more(writer):
        writer.add_key_length(8)
        writer.add_value_length(8)
        writer.add_eot_token_id(7)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    tensors = make_tensors(CONFIG | {"tie_word_embeddings": True}, bias=True)
    config = open_checkpoint(write_gguf(tmp_path / "m", tensors, arch="qwen3", more=more)).config
    assert (config.model_type, config.head_dim, config.q_size) == ("qwen3", 8, 32)
    assert config.tie_word_embeddings
    assert config.attention_bias
    assert config.eos_token_ids == (2, 7)
    assert config.rope_scaling.rope_type == "yarn"
    assert (config.rope_scaling.factor, config.rope_scaling.original_max_position_embeddings) == (4.0, 16)


def test_linear_rope_scaling(tmp_path):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    scaling = open_checkpoint(write_gguf(tmp_path / "m", make_tensors(), more=more)).config.rope_scaling
    assert (scaling.rope_type, scaling.factor) == ("linear", 2.5)


def test_llama3_divisors_are_taken_from_their_tensor(tmp_path):
    divisors = np.array([1, 1, 1, 1, 1.5, 8, 32, 32], np.float32)
    path = write_gguf(tmp_path / "m", make_tensors(), extra={"rope_freqs.weight": divisors})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.rope_scaling.rope_type == "llama3"
    assert checkpoint.config.rope_scaling.freq_factors == tuple(divisors.tolist())
    assert checkpoint.config.rope_scaling.factor == 32
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_metadata_equals_what_was_written(tmp_path):
    numbers = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": 1e-300,
        "bool": True,
        "string": "é\n中",
    }
    arrays = {"words": ["a", "", "é"], "ints": [1, -2, 3], "floats": [0.5, -1.5], "flags": [True, False]}

    def more(writer):
        for kind, value in numbers.items():
            getattr(writer, f"add_{kind}")(f"x.{kind}", value)
        for key, value in arrays.items():
            writer.add_array(f"x.{key}", value)

    metadata = open_checkpoint(write_gguf(tmp_path / "m", make_tensors(), more=more)).metadata
    for key, value in (numbers | arrays).items():
        assert metadata[f"x.{key}"] == value, key
        assert type(metadata[f"x.{key}"]) is type(value)
    assert metadata["tokenizer.ggml.tokens"] == [f"t{i}é" for i in range(20)]
    assert metadata["tokenizer.ggml.scores"] == [-0.5 * i for i in range(20)]


def test_alignment_other_than_the_usual(tmp_path):
    tensors = make_tensors()
    path = write_gguf(tmp_path / "m", tensors, more=lambda writer: writer.add_custom_alignment(64))
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata["general.alignment"] == 64
    assert all((checkpoint.load(name) == tensor).all() for name, tensor in tensors.items())


def test_version_2_reads_like_version_3(tmp_path):
    path = write_gguf(tmp_path / "m", make_tensors())
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    assert (open_checkpoint(path).load("model.norm.weight") == make_tensors()["model.norm.weight"]).all()


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["stories260K/stories260Ktok512.gguf", "llama-2-tiny-random/llama-2-tiny-random.gguf"]
)
def test_real_files_equal_the_gguf_reader(shared, name):
    path = shared / "models" / name
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    checkpoint = open_checkpoint(path)
    translated = {gguf_name(name): name for name in checkpoint.tensors}
    plain = {name: checkpoint.load(name) for name in checkpoint.tensors}
    config = {
        "num_attention_heads": checkpoint.config.num_attention_heads,
        "num_key_value_heads": checkpoint.config.num_key_value_heads,
    }
    interleaved = as_interleaved(plain, config)
    for tensor in theirs.tensors:
        assert interleaved[translated[tensor.name]].tobytes() == tensor.data.tobytes()
