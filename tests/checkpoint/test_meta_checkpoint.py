"""Folders as Meta hands them out, and what torch.save itself writes."""

from __future__ import annotations

import json
import mmap
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from checkpoint_writers import BFLOAT16, CONFIG, make_tensors

from kuiperllm.checkpoint import TensorInfo, open_checkpoint
from kuiperllm.checkpoint.meta_params import config_of, feed_forward_size
from kuiperllm.checkpoint.torch_file import TorchFile
from kuiperllm.config import ModelConfig
from kuiperllm.errors import CheckpointError, ConfigError, UnsupportedError
from meta_checkpoints import (
    STORAGES,
    Raw,
    TensorCode,
    as_meta,
    container,
    cut,
    opcodes,
    params_of,
    saved,
    write_meta,
)

FOUR_HEADS = CONFIG | {"num_key_value_heads": 4}


def assert_equal(checkpoint, tensors):
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        loaded = checkpoint.load(name)
        assert checkpoint.tensors[name] == TensorInfo(
            name, expected.dtype.name, expected.shape, expected.nbytes
        )
        assert (loaded.dtype, loaded.shape) == (expected.dtype, expected.shape)
        assert loaded.tobytes() == expected.tobytes(), name
        assert loaded.flags.aligned
        assert not loaded.flags.writeable
        checkpoint.release(name)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize(("shards", "embedding_axis"), [(1, 1), (2, 1), (2, 0), (4, 1), (4, 0)])
def test_values_come_back_bit_equal(tmp_path, dtype, shards, embedding_axis):
    tensors = make_tensors(FOUR_HEADS, dtype)
    write_meta(tmp_path, tensors, FOUR_HEADS, shards=shards, embedding_axis=embedding_axis)
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.format, checkpoint.path) == ("meta", tmp_path)
        sizes = {n: i.nbytes for n, i in checkpoint.tensors.items()}
        assert sum(sizes.values()) == sum(tensor.nbytes for tensor in tensors.values())
        assert_equal(checkpoint, tensors)


@pytest.mark.parametrize(
    "options", [{"wide": False}, {"wide_sizes": True}, {"align": 1}, {"align": 64, "shift": 1}], ids=str
)
@pytest.mark.parametrize("shards", [1, 2])
def test_any_form_of_archive_and_any_alignment(tmp_path, shards, options):
    tensors = make_tensors()
    assert_equal(open_checkpoint(write_meta(tmp_path, tensors, CONFIG, shards=shards, **options)), tensors)


def test_kv_heads_that_ranks_share_between_them(tmp_path):
    """Two shards, one head of keys: the rows of a head are cut in two."""
    config = CONFIG | {"num_key_value_heads": 1}
    tensors = make_tensors(config)
    assert_equal(open_checkpoint(write_meta(tmp_path, tensors, config, shards=2)), tensors)


def test_naming_a_shard_opens_them_all(tmp_path):
    write_meta(tmp_path, make_tensors(), CONFIG, shards=2)
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        assert_equal(open_checkpoint(tmp_path / name), make_tensors())
        assert open_checkpoint(tmp_path / name).path == tmp_path


def test_arrays_are_views_of_the_file_where_they_can_be(tmp_path):
    checkpoint = open_checkpoint(write_meta(tmp_path / "whole", make_tensors(), CONFIG))
    name = "model.layers.0.mlp.gate_proj.weight"
    array = checkpoint.load(name)
    assert np.shares_memory(array, checkpoint.load(name))
    while isinstance(array, np.ndarray):
        array = array.base
    assert isinstance(array, memoryview | mmap.mmap)
    two = open_checkpoint(write_meta(tmp_path / "two", make_tensors(), CONFIG, shards=2))
    assert not np.shares_memory(two.load(name), two.load(name))


def test_tensors_that_share_a_storage_and_strides_of_any_order(tmp_path):
    """As in files of Llama 1, where the matrices of a layer are views of one storage."""
    tensors = make_tensors()
    state = as_meta(tensors, CONFIG)
    [whole] = [np.concatenate([tensor.ravel() for tensor in state.values()])]
    codes, offset = {}, 0
    for name, tensor in state.items():
        strides = (tensor.shape[1], 1) if tensor.ndim == 2 else (1,)
        codes[name] = TensorCode(tensor.shape, strides, whole.size, offset=offset)
        offset += tensor.size
    w1 = state["layers.1.feed_forward.w1.weight"]
    transposed = TensorCode(w1.shape, (1, w1.shape[0]), w1.size, "1")
    codes["layers.1.feed_forward.w1.weight"] = transposed
    (tmp_path / "params.json").write_text(json.dumps(params_of(CONFIG)))
    storages = {"0": whole.tobytes(), "1": w1.T.tobytes()}
    (tmp_path / "consolidated.00.pth").write_bytes(container(codes, storages))
    assert_equal(open_checkpoint(tmp_path), tensors)


def test_putting_shards_together_takes_no_more_than_the_tensor(tmp_path):
    config = CONFIG | {"hidden_size": 1024, "num_hidden_layers": 1}
    write_meta(tmp_path, make_tensors(config), config, shards=4)
    checkpoint = open_checkpoint(tmp_path)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        tracemalloc.start()
        array = checkpoint.load(name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert array.nbytes == 4 << 20
        assert peak < array.nbytes + (256 << 10)


def test_closed(tmp_path):
    for shards in (1, 2):
        with open_checkpoint(write_meta(tmp_path, make_tensors(), CONFIG, shards=shards)) as checkpoint:
            array = checkpoint.load("model.norm.weight")
        with pytest.raises(CheckpointError, match="closed"):
            checkpoint.load("lm_head.weight")
        assert array.tobytes() == make_tensors()["model.norm.weight"].tobytes()


# --- tied embeddings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_an_output_equal_to_the_embedding_is_tied(tmp_path, shards, embedding_axis):
    tensors = make_tensors()
    head = tensors["lm_head.weight"]
    head[:] = tensors["model.embed_tokens.weight"]
    head[0, 0] = np.nan
    tensors["model.embed_tokens.weight"][0, 0] = np.nan
    options = {"shards": shards, "embedding_axis": embedding_axis}
    checkpoint = open_checkpoint(write_meta(tmp_path / "equal", tensors, CONFIG, **options))
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.tensors
    head[-1, -1] = np.nextafter(head[-1, -1], np.float32(1))
    checkpoint = open_checkpoint(write_meta(tmp_path / "almost", tensors, CONFIG, **options))
    assert not checkpoint.config.tie_word_embeddings
    assert_equal(checkpoint, tensors)


def test_an_output_that_is_absent_or_the_same_storage_is_tied(tmp_path):
    tied = CONFIG | {"tie_word_embeddings": True}
    tensors = make_tensors(tied)
    checkpoint = open_checkpoint(write_meta(tmp_path, tensors, tied))
    assert checkpoint.config.tie_word_embeddings
    assert_equal(checkpoint, tensors)
    state = as_meta(tensors, tied)
    state["output.weight"] = state["tok_embeddings.weight"]
    (tmp_path / "consolidated.00.pth").write_bytes(saved(state))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings
    assert_equal(checkpoint, tensors)


# --- configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "size"),
    [
        (4096, 256, None, 11008),  # Llama 2 7B
        (5120, 256, None, 13824),  # Llama 2 13B
        (8192, 4096, 1.3, 28672),  # Llama 2 and 3 70B
        (8192, 256, 1.0, 22016),  # Code Llama 34B
        (4096, 1024, 1.3, 14336),  # Llama 3 8B
        (2048, 256, 1.5, 8192),  # Llama 3.2 1B
        (3072, 256, 1.0, 8192),  # Llama 3.2 3B
        (16384, 4096, 1.2, 53248),  # Llama 3.1 405B
    ],
)
def test_feed_forward_sizes_are_those_of_the_published_configs(dim, multiple_of, multiplier, size):
    assert feed_forward_size(dim, multiple_of, multiplier) == size


SMALL_PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32}


def small_config(vocab_size=32000, *, tied=False, **params):
    return config_of(
        SMALL_PARAMS | params,
        "params.json",
        vocab_size=vocab_size,
        intermediate_size=192,
        tied=tied,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("config", "context", "factor"),
    [
        (small_config(), 4096, None),
        (small_config(32016, rope_theta=1e6), 16384, None),
        (small_config(128256, rope_theta=5e5), 8192, None),
        (small_config(128256, rope_theta=5e5, use_scaled_rope=False), 8192, None),
        (small_config(128256, rope_theta=5e5, use_scaled_rope=True), 131072, 8.0),
        (small_config(128256, rope_theta=5e5, use_scaled_rope=True, tied=True), 131072, 32.0),
        (small_config(128256, use_scaled_rope=True, rope_scaling_factor=16, tied=True), 131072, 16.0),
        (small_config(max_seq_len=700), 700, None),
    ],
    ids=range(8),
)
def test_contexts_and_rope_scaling(config, context, factor):
    assert config.max_position_embeddings == context
    scaling = config.rope_scaling
    if factor is None:
        assert scaling.rope_type == "default"
    else:
        assert (scaling.rope_type, scaling.factor) == ("llama3", factor)
        assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
        assert scaling.original_max_position_embeddings == 8192


def test_what_params_do_not_say(tmp_path):
    params = {"norm_eps": None, "rope_theta": None, "n_kv_heads": None, "multiple_of": None}
    config = open_checkpoint(write_meta(tmp_path, make_tensors(FOUR_HEADS), FOUR_HEADS, params=params)).config
    assert (config.model_type, config.vocab_size, config.hidden_size, config.intermediate_size) == (
        *("llama", 20),
        *(64, 96),
    )
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 4)
    assert (config.head_dim, config.rms_norm_eps, config.rope_theta) == (16, 1e-5, 10000.0)
    assert (config.tie_word_embeddings, config.dtype) == (False, "float32")
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


LLAMA3 = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "params", "tied"),
    [
        ("llama-2-7b-chat", {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}, False),
        (
            "llama-3.1-8b-instruct",
            LLAMA3
            | {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
            False,
        ),
        (
            "llama-3.2-3b-instruct",
            LLAMA3
            | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
            True,
        ),
    ],
)
def test_configurations_are_those_of_hugging_face(shared, name, params, tied):
    raw = json.loads((shared / "configs" / name / "config.json").read_text())
    expected = ModelConfig.from_hf(raw).to_hf()
    found = config_of(
        params,
        "params.json",
        vocab_size=raw["vocab_size"],
        intermediate_size=raw["intermediate_size"],
        tied=tied,
        dtype="bfloat16",
    ).to_hf()
    unstated = ("bos_token_id", "eos_token_id", "attention_bias", "torch_dtype", "rms_norm_eps")
    for key in expected.keys() - unstated:
        assert found[key] == expected[key], key


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"dim": None}, ConfigError, "dim is missing"),
        ({"dim": "64"}, ConfigError, "dim must be a whole number"),
        ({"dim": 10**9}, ConfigError, "dim=1000000000 is outside"),
        ({"n_heads": 3}, ConfigError, "dim=64 is not a multiple of n_heads=3"),
        ({"n_heads": 0}, ConfigError, "n_heads=0 is outside"),
        ({"n_heads": 64}, ConfigError, "head_dim=1 is odd"),
        ({"n_kv_heads": 3}, ConfigError, "not a multiple of"),
        ({"n_layers": 10**9}, ConfigError, "n_layers=1000000000 is outside"),
        ({"n_layers": 3}, CheckpointError, "there is no tensor 'model.layers.2"),
        ({"n_layers": 1}, CheckpointError, "has tensor model.layers.1.* ask for 1 layers"),
        ({"norm_eps": float("nan")}, ConfigError, "norm_eps must be a finite number"),
        ({"vocab_size": 21}, ConfigError, "vocab_size=21, but tok_embeddings has 20 rows"),
        ({"vocab_size": -2}, ConfigError, "vocab_size=-2 is outside"),
        ({"multiple_of": 64}, ConfigError, "asks for 64 rows of w1, but the files hold 96"),
        ({"multiple_of": 0}, ConfigError, "multiple_of=0 is outside"),
        ({"ffn_dim_multiplier": 1e300}, ConfigError, "rows of w1"),
        ({"hidden_dim": 97}, ConfigError, "asks for 97 rows of w1, but the files hold 96"),
        ({"n_heads": 8}, CheckpointError, r"k_proj.weight has the shape \[32, 64\].*ask for \[16, 64\]"),
        ({"head_dim": 32}, CheckpointError, r"q_proj.weight has the shape \[64, 64\].*ask for \[128, 64\]"),
        ({"use_scaled_rope": 1}, ConfigError, "use_scaled_rope must be true or false"),
        ({"lora_args": {"rank": 16}}, UnsupportedError, "lora_args={'rank': 16} is not supported"),
        ({"quantization_args": {"group_size": 32}}, UnsupportedError, "quantization_args"),
        ({"vision_chunk_size": 560}, UnsupportedError, "vision_chunk_size=560"),
        ({"moe": {}}, UnsupportedError, "moe={}"),
        ({"sliding_window": 4096}, UnsupportedError, "sliding_window=4096"),
    ],
    ids=str,
)
def test_bad_params(tmp_path, params, error, message):
    write_meta(tmp_path, make_tensors(), CONFIG)
    stated = {key: value for key, value in (params_of(CONFIG) | params).items() if value is not None}
    (tmp_path / "params.json").write_text(json.dumps(stated))
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_params_that_are_no_object(tmp_path, text, message):
    write_meta(tmp_path, make_tensors(), CONFIG)
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path)


def test_shards_without_params(tmp_path):
    write_meta(tmp_path, make_tensors(), CONFIG, shards=2)
    (tmp_path / "params.json").unlink()
    with pytest.raises(UnsupportedError, match=r"with params\.json beside them .* are read"):
        open_checkpoint(tmp_path / "consolidated.00.pth")


# --- shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([0], r"the shard consolidated\.00\.pth is missing, but consolidated\.01\.pth is there"),
        ([1], r"the shard consolidated\.01\.pth is missing, but consolidated\.02\.pth is there"),
        ([3], "asks for 96 rows of w1, but the files hold 72 of them; a shard is missing"),
        ([2, 3], "a shard is missing"),
    ],
)
@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_missing_shards(tmp_path, gone, message, embedding_axis):
    write_meta(tmp_path, make_tensors(), CONFIG, shards=4, embedding_axis=embedding_axis)
    for rank in gone:
        (tmp_path / f"consolidated.{rank:02}.pth").unlink()
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_checkpoint(tmp_path)


def test_a_missing_shard_where_params_say_nothing_of_sizes(tmp_path):
    write_meta(tmp_path, make_tensors(), CONFIG, shards=2, params={"multiple_of": None})
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"from 1 file\(s\), but the parameters ask for .* is missing"):
        open_checkpoint(tmp_path)


def rewritten(folder, rank, change):
    """Two shards, one of which has been changed before it was written."""
    write_meta(folder, make_tensors(), CONFIG, shards=2)
    state = cut(as_meta(make_tensors(), CONFIG), 2)[rank]
    change(state)
    (folder / f"consolidated.{rank:02}.pth").write_bytes(saved(state))
    return folder


def set_to(name, make):
    return lambda state: state.update({name: make(state.get(name))})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), "lacks tensor 'norm.weight', which consolidated"),
        (set_to("layers.7.ffn_norm.weight", lambda _: np.ones(64, np.float32)), "lacks tensor 'layers.7.ffn"),
        (
            set_to("norm.weight", lambda old: old.astype(np.float16)),
            r"'norm.weight' is float\d\d of shape \[64\], but float\d\d",
        ),
        (set_to("norm.weight", lambda old: old[:32].copy()), r"of shape \[.*\], but float32 of shape \[.*\]"),
        (
            set_to("output.weight", lambda old: old[1:].copy()),
            r"of shape \[.*\], but float32 of shape \[.*\]",
        ),
        (set_to("layers.0.attention.wo.weight", lambda old: old.ravel()), "of shape"),
    ],
    ids=range(6),
)
def test_shards_that_disagree(tmp_path, rank, change, message):
    folder = rewritten(
        tmp_path, rank, lambda state: (state.update({"rope.freqs": np.ones(4, np.float32)}), change(state))
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert "consolidated.0" in str(caught.value)


def one_file(folder, change):
    """A folder of one shard whose state has been changed before it was written."""
    state = as_meta(make_tensors(), CONFIG)
    change(state)
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params_of(CONFIG)))
    (folder / "consolidated.00.pth").write_bytes(saved(state))
    return folder


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: state.pop("tok_embeddings.weight"), CheckpointError, "lacks tensor tok_embeddings"),
        (
            lambda state: state.pop("layers.0.feed_forward.w1.weight"),
            CheckpointError,
            "lacks tensor layers.0",
        ),
        (lambda state: state.pop("layers.1.attention.wv.weight"), CheckpointError, "no tensor .*1.*v_proj"),
        (lambda state: state.pop("norm.weight"), CheckpointError, "no tensor 'model.norm.weight'"),
        (
            set_to("layers.0.attention.wq.bias", lambda _: np.ones(64, np.float32)),
            UnsupportedError,
            "'layers.0.attention.wq.bias' belongs to no part of a Llama network",
        ),
        (
            set_to("layers.0.attention.wq.weight.scale", lambda _: np.ones(64, np.float32)),
            UnsupportedError,
            "belongs to no part",
        ),
        (
            set_to("layers.00.ffn_norm.weight", lambda _: np.ones(64, np.float32)),
            UnsupportedError,
            "belongs to no part",
        ),
        (
            set_to("layers.0.attention.wq.weight", lambda old: old.astype(np.int8)),
            UnsupportedError,
            "is of int8, which is not supported; supported: bfloat16, float16, float32",
        ),
        (set_to("norm.weight", lambda old: old.reshape(1, 8, 8)), CheckpointError, r"shape \[1, 8, 8\]"),
        (set_to("norm.weight", lambda old: old[:0].copy()), CheckpointError, r"the shape \[0\]"),
        (set_to("norm.weight", lambda old: old.reshape(8, 8)), CheckpointError, r"norm.* shape \[8, 8\]"),
        (set_to("norm.weight", lambda _: 3), CheckpointError, "'norm.weight' is no tensor with a name"),
        (lambda state: state.clear(), CheckpointError, "holds no dictionary of tensors"),
    ],
    ids=range(13),
)
def test_tensors_that_do_not_fit(tmp_path, change, error, message):
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(one_file(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_rotary_tables_are_left_out(tmp_path):
    tables = ("rope.freqs", "layers.0.attention.inner_attention.rope.freqs", "freqs_cos", "freqs_sin")
    ones = np.ones((32, 8), np.float32)
    folder = one_file(tmp_path, lambda state: state.update(dict.fromkeys(tables, ones)))
    assert_equal(open_checkpoint(folder), make_tensors())


def test_shards_that_are_something_else(tmp_path):
    write_meta(tmp_path, make_tensors(), CONFIG, shards=2)
    second = tmp_path / "consolidated.01.pth"
    for content, message in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"\x80\x02}q\x00.", "pickle, which can run code and is never loaded"),
        (b"<html>404</html>", "is no file of torch.save; copy or download it again"),
        (b"", "the file is empty"),
    ]:
        second.write_bytes(content)
        with pytest.raises((CheckpointError, UnsupportedError), match=message) as caught:
            open_checkpoint(tmp_path)
        assert "consolidated.01.pth" in str(caught.value)


# --- training checkpoints of llama2.c ---------------------------------------------------------------------


def training_checkpoint(tensors, prefix="", **changes):
    state = {prefix + name: tensor for name, tensor in as_meta(tensors, CONFIG).items()}
    if "lm_head.weight" not in tensors:
        state[f"{prefix}output.weight"] = state[f"{prefix}tok_embeddings.weight"]
    arguments = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 20}
    arguments |= {"multiple_of": 32, "hidden_dim": 96, "max_seq_len": 32, "dropout": 0.0}
    return {
        "model": state,
        "optimizer": {
            "state": {0: {"step": np.ones(1, np.float32)}},
            "param_groups": [{"lr": 1e-3, "amsgrad": False}],
        },
        "model_args": arguments | changes,
        "iter_num": 1000,
        "best_val_loss": np.array(1.5, np.float32),
        "config": {"out_dir": "out", "compile": True, "seed": None},
    }


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_training_checkpoint_of_llama2c(tmp_path, prefix, tied):
    tensors = make_tensors(CONFIG | {"tie_word_embeddings": tied})
    path = tmp_path / "ckpt.pt"
    path.write_bytes(saved(training_checkpoint(tensors, prefix)))
    for source in (path, tmp_path):
        with open_checkpoint(source) as checkpoint:
            assert (checkpoint.format, checkpoint.path) == ("llama2.c training", path)
            assert checkpoint.config.tie_word_embeddings is tied
            assert checkpoint.config.max_position_embeddings == 32
            assert_equal(checkpoint, tensors)


def test_training_checkpoints_that_contradict_themselves(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(saved(training_checkpoint(make_tensors(), n_heads=0)))
    with pytest.raises(ConfigError, match=r"ckpt\.pt: model_args: n_heads=0 is outside"):
        open_checkpoint(path)
    path.write_bytes(saved(training_checkpoint(make_tensors()) | {"model": [1]}))
    with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
        open_checkpoint(path)


# --- torch.save -------------------------------------------------------------------------------------------


def test_every_type_of_storage(tmp_path):
    arrays = {str(dtype): np.arange(6).reshape(2, 3).astype(dtype) for dtype in STORAGES}
    (tmp_path / "all").write_bytes(saved(arrays))
    file = TorchFile(tmp_path / "all")
    for name, expected in arrays.items():
        found = file.array(file.root[name])
        assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes())


def test_protocol_4_and_memo(tmp_path):
    """What `pickle_protocol=4` makes torch.save write: frames, short strings, globals from the stack."""

    def text(value):
        return b"\x8c" + bytes([len(value)]) + value.encode() + b"\x94"

    code = b"\x80\x04\x95" + bytes(8) + b"}\x94(" + text("a")
    code += text("torch._utils") + text("_rebuild_tensor_v2") + b"\x93\x94(("
    code += text("storage") + text("torch") + text("FloatStorage") + b"\x93\x94" + text("0") + text("cpu")
    code += b"K\x04t\x94QK\x01K\x03\x85\x94K\x01\x85\x94\x89" + text("collections") + text("OrderedDict")
    code += b"\x93\x94)R\x94t\x94R\x94" + text("b") + b"h\x00" + text("c") + b"h\x0d" + b"u."
    (tmp_path / "file").write_bytes(container(code, {"0": np.arange(4, dtype=np.float32).tobytes()}))
    root = TorchFile(tmp_path / "file").root
    assert TorchFile(tmp_path / "file").array(root["a"]).tolist() == [1, 2, 3]
    assert root["b"] is root
    assert root["c"] == (1,)


def test_old_tensors_parameters_and_metadata(tmp_path):
    tensor = TensorCode((2,), (1,), 3, offset=1)
    old = TensorCode((2,), (1,), 3, function="torch._utils\n_rebuild_tensor\n", more=())
    parameter = Raw(b"ctorch._utils\n_rebuild_parameter\n(" + opcodes(tensor) + b"\x88}tR")
    state = Raw(
        b"ccollections\nOrderedDict\n)R(X\x01\0\0\0a" + opcodes(tensor) + b"u}X\x09\0\0\0_metadata}sb"
    )
    (tmp_path / "file").write_bytes(
        container({"old": old, "p": parameter, "s": state}, {"0": np.arange(3, dtype=np.float32).tobytes()})
    )
    file = TorchFile(tmp_path / "file")
    assert file.array(file.root["old"]).tolist() == [0, 1]
    assert file.array(file.root["p"]).tolist() == [1, 2]
    assert {name: file.array(tensor).tolist() for name, tensor in file.root["s"].items()} == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("shape", "strides", "values"),
    [
        ((1, 3), (1 << 64, 1), [[1, 2, 3]]),
        ((3, 1), (1, 1 << 64), [[1], [2], [3]]),
        ((0, 2), (1 << 64, 1 << 64), []),
        ((2, 2), (1, 1), [[1, 2], [2, 3]]),
        ((3,), (0,), [1, 1, 1]),
        ((), (), 1),
    ],
)
def test_strides(tmp_path, shape, strides, values):
    code = TensorCode(shape, strides, 4, offset=1)
    (tmp_path / "file").write_bytes(container({"a": code}, {"0": np.arange(4, dtype=np.float32).tobytes()}))
    file = TorchFile(tmp_path / "file")
    found = file.array(file.root["a"])
    assert (found.shape, found.tolist()) == (shape, values)
    assert file.bytes_of(file.root["a"]).reshape(-1).tobytes() == found.tobytes()


@pytest.mark.oracle
def test_files_of_torch_itself(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
    base = torch.randn(6, 8)
    linear = torch.nn.Linear(3, 2)
    state = {
        "float32": base,
        "bfloat16": base.bfloat16(),
        "half": base.half(),
        "double": base.double(),
        "int64": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "transposed": base.T,
        "view": base[2:4, 1::2],
        "parameter": torch.nn.Parameter(base[0].clone()),
        "module": linear.state_dict(),
        "nested": {"list": [1, 2.5, None, True, "text", (1, -70000)], 3: OrderedDict(a=base)},
    }
    for version in (2, 3, 4, 5):
        path = tmp_path / f"{version}.pt"
        torch.save(state, path, pickle_protocol=version)
        file = TorchFile(path)
        for name, expected in state.items():
            if not isinstance(expected, torch.Tensor):
                continue
            expected = expected.detach()
            found = file.array(file.root[name])
            assert found.shape == tuple(expected.shape), name
            assert found.dtype.name == str(expected.dtype).removeprefix("torch."), name
            assert found.astype(np.float64).tolist() == expected.double().tolist(), name
        assert file.array(file.root["module"]["weight"]).tolist() == linear.weight.tolist()
        assert file.root["nested"]["list"] == state["nested"]["list"]
        assert file.array(file.root["nested"][3]["a"]).tolist() == base.tolist()
        # views of one storage stay views of it
        assert file.root["float32"].storage == file.root["view"].storage == file.root["transposed"].storage
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"torch\.save before version 1\.6"):
        open_checkpoint(tmp_path / "old.pt")


@pytest.mark.oracle
@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_of_torch_itself(tmp_path, shards):
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
    tensors = make_tensors()
    (tmp_path / "params.json").write_text(json.dumps(params_of(CONFIG)))
    for rank, state in enumerate(cut(as_meta(tensors, CONFIG), shards)):
        values = OrderedDict((name, torch.from_numpy(tensor)) for name, tensor in state.items())
        torch.save(values, tmp_path / f"consolidated.{rank:02}.pth")
    assert_equal(open_checkpoint(tmp_path), tensors)


@pytest.mark.oracle
def test_the_files_of_these_tests_are_read_by_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
    for options in ({}, {"wide": False}, {"wide_sizes": True}):
        folder = write_meta(tmp_path, make_tensors(), CONFIG, **options)
        state = torch.load(folder / "consolidated.00.pth", weights_only=True)
        for name, tensor in as_meta(make_tensors(), CONFIG).items():
            assert state[name].numpy().tobytes() == tensor.tobytes()
