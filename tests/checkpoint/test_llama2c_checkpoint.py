"""llama2.c files of all versions."""

from __future__ import annotations

from math import gcd

import numpy as np
import pytest
from checkpoint_writers import CONFIG, as_interleaved, make_tensors, quantized, write_llama2c

from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, UnsupportedError
from kuiperllm.quant import QuantTensor, q8

TIED = CONFIG | {"tie_word_embeddings": True}


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("version", [0, 1])
def test_float32_comes_back_bit_equal(tmp_path, version, config):
    tensors = make_tensors(config)
    with open_checkpoint(write_llama2c(tmp_path / "m", tensors, config, version=version)) as checkpoint:
        assert checkpoint.format == "llama2.c"
        assert set(checkpoint.tensors) == set(tensors)
        for name, expected in tensors.items():
            loaded = checkpoint.load(name)
            assert loaded.dtype == np.float32
            assert loaded.tobytes() == expected.tobytes(), name
            checkpoint.release(name)


@pytest.mark.parametrize("group_size", [32, 8, 1])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_int8_groups(tmp_path, config, group_size):
    tensors = make_tensors(config)
    checkpoint = open_checkpoint(
        write_llama2c(tmp_path / "m", tensors, config, version=2, group_size=group_size)
    )
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        loaded = checkpoint.load(name)
        if tensor.ndim == 1:
            assert loaded.tobytes() == tensor.tobytes()
            continue
        values, scales = quantized(
            tensor, group_size
        )  # rows are quantized alone, so their order is no matter
        assert isinstance(loaded, QuantTensor)
        assert (loaded.group_size, checkpoint.tensors[name].dtype) == (group_size, "q8")
        assert (loaded.codes.data.view(np.int8) == values.reshape(tensor.shape)).all(), name
        assert (loaded.scales == scales.reshape(tensor.shape[0], -1)).all(), name
        assert loaded.scales.dtype == np.float32
        assert loaded.nbytes == checkpoint.tensors[name].nbytes


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("group_size", [32, 16, 512, 24, 256])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_int8_groups_run_over_the_flattened_matrix(tmp_path, config, group_size, version):
    config = config | {"vocab_size": 24}
    if group_size == 24:
        config = config | {"hidden_size": 48, "intermediate_size": 80}
    tensors = make_tensors(config)
    path = write_llama2c(tmp_path / "m", tensors, config, version=version, group_size=group_size)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.config.vocab_size, checkpoint.config.tie_word_embeddings) == (
        24,
        config["tie_word_embeddings"],
    )
    stored = as_interleaved(tensors, config)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        loaded, info = checkpoint.load(name), checkpoint.tensors[name]
        if tensor.ndim == 1 or (version == 3 and name == "model.embed_tokens.weight"):
            assert loaded.tobytes() == tensor.tobytes()
            continue
        values, scales = quantized(stored[name], group_size)
        expected = (values.astype(np.float32) * scales[:, None]).reshape(tensor.shape)
        floats = loaded.dequantize() if isinstance(loaded, QuantTensor) else loaded
        # Groups that cross rows are read as smaller ones with the same scale, unless those were too small.
        whole = gcd(group_size, tensor.shape[1])
        assert isinstance(loaded, QuantTensor) == (whole >= 16)
        assert info.scheme == (q8(whole, DType.float32) if whole >= 16 else None)
        assert info.dtype == ("q8" if isinstance(loaded, QuantTensor) else "float32")
        assert (as_interleaved({name: floats}, config)[name] == expected).all(), name


def test_version_3_of_another_size_is_refused_as_version_0(tmp_path):
    path = write_llama2c(tmp_path / "m", make_tensors(TIED), TIED, version=3, group_size=16)
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"a llama2\.c version 0 checkpoint with"):
        open_checkpoint(path)


def test_configuration(tmp_path):
    config = open_checkpoint(write_llama2c(tmp_path / "m", make_tensors(TIED), TIED, version=0)).config
    assert (config.model_type, config.vocab_size, config.hidden_size, config.intermediate_size) == (
        "llama",
        20,
        64,
        96,
    )
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 2)
    assert (config.head_dim, config.max_position_embeddings) == (16, 32)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-5, 10000.0, True)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize("group_size", [0, -1, 7, 1 << 30])
def test_groups_that_do_not_divide_a_matrix_are_refused(tmp_path, group_size):
    path = write_llama2c(tmp_path / "m", make_tensors(), CONFIG, version=2, group_size=32)
    raw = bytearray(path.read_bytes())
    raw[37:41] = group_size.to_bytes(4, "little", signed=True)
    path.write_bytes(raw)
    with pytest.raises(UnsupportedError, match=f"groups of {group_size} do not divide all of its matrices"):
        open_checkpoint(path)


@pytest.mark.shared
def test_three_files_of_one_network_are_equal(shared):
    folder = shared / "models/stories260K"
    v0, v1, gguf = (
        open_checkpoint(folder / name)
        for name in ("stories260K.bin", "stories260K_v1.bin", "stories260Ktok512.gguf")
    )
    assert set(v0.tensors) == set(v1.tensors) == set(gguf.tensors) - {"lm_head.weight"}
    assert len(v0.tensors) == 47
    for name in v0.tensors:
        assert v0.load(name).tobytes() == v1.load(name).tobytes() == gguf.load(name).tobytes()
    assert gguf.load("lm_head.weight").tobytes() == v0.load("model.embed_tokens.weight").tobytes()
    # The first row of a query projection stays, the second comes from the third: pairs become halves.
    raw = np.fromfile(folder / "stories260K.bin", "<f4", offset=28)
    wq = raw[512 * 64 + 5 * 64 :][: 64 * 64].reshape(64, 64)
    assert v0.load("model.layers.0.self_attn.q_proj.weight")[1].tobytes() == wq[2].tobytes()
    assert v0.config == v1.config
