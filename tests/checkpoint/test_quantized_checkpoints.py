"""Quantized safetensors of several programs against plain readings of their descriptions."""

from __future__ import annotations

import logging
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from checkpoint_writers import BFLOAT16, CONFIG, make_tensors, write_folder
from quantized_writers import (
    DOWN,
    E4M3,
    UP,
    WIDE,
    awq,
    gptq,
    packed_int,
    random_e4m3,
    read_awq,
    read_gptq,
    read_packed_int,
    shape_of,
    write_quantized,
)

from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.checkpoint.check import BadTensor, find_bad_tensors
from kuiperllm.checkpoint.quantized import ours
from kuiperllm.core.dtype import DType
from kuiperllm.errors import CheckpointError, ConfigError, KuiperError, UnsupportedError
from kuiperllm.quant import Scheme, q4, q8, quantize
from kuiperllm.quant.packed_words import rows_of_awq, rows_of_gptq

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
OURS = {"quant_method": "kuiper", "bits": 4, "group_size": 32, "zero_point": False}
MODULES = UP, DOWN


def compressed(form, **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


PACKED = compressed("pack-quantized")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def assert_holds(checkpoint, module, expected, dtype, scheme):
    """The matrix of a module is this one, in float32 bit for bit, and described so."""
    name = f"{module}.weight"
    info, loaded = checkpoint.tensors[name], checkpoint.load(name)
    assert (info.dtype, info.shape, info.scheme) == (dtype, expected.shape, scheme)
    assert loaded.scheme == scheme
    assert loaded.dequantize().tobytes() == expected.tobytes()
    for array in loaded.arrays:
        assert not array.flags.writeable
    checkpoint.release(name)


# --- AWQ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "scales"), [(32, np.float16), (128, np.float16), (64, BFLOAT16)])
def test_awq(tmp_path, rng, group, scales):
    parts = {module: awq(rng, shape_of(module), group) for module in MODULES}
    for arrays in parts.values():
        arrays["scales"] = arrays["scales"].astype(scales)
    checkpoint = open_checkpoint(write_quantized(tmp_path, parts, AWQ | {"group_size": group}))
    kept = DType.float16 if scales == np.float16 else DType.float32
    for module, arrays in parts.items():
        scheme = Scheme(4, group, kept, "zeros")
        assert_holds(checkpoint, module, read_awq(arrays, group), "awq-q4", scheme)
        nbytes = sum(array.nbytes for array in arrays.values())
        assert checkpoint.tensors[f"{module}.weight"].nbytes == nbytes
    # What was not converted is there as it is.
    assert checkpoint.tensors["lm_head.weight"].dtype == "float16"
    assert checkpoint.load("model.layers.0.self_attn.q_proj.weight").dtype == np.float16
    assert not any(name.endswith(("scales", "qzeros", "qweight")) for name in checkpoint.tensors)


def test_awq_with_one_scale_for_each_row(tmp_path, rng):
    arrays = awq(rng, shape_of(DOWN), 256)
    checkpoint = open_checkpoint(write_quantized(tmp_path, {DOWN: arrays}, AWQ | {"group_size": -1}))
    assert_holds(checkpoint, DOWN, read_awq(arrays, 256), "awq-q4", q4(128, symmetric=False))


# --- GPTQ -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", [None, "gptq", "gptq_v2"])
def test_gptq(tmp_path, rng, bits, act_order, form):
    parts = {module: gptq(rng, shape_of(module), 32, bits, act_order=act_order) for module in MODULES}
    config = GPTQ | {"bits": bits, "desc_act": act_order} | ({"checkpoint_format": form} if form else {})
    checkpoint = open_checkpoint(write_quantized(tmp_path, parts, config))
    for module, arrays in parts.items():
        expected = read_gptq(arrays, bits, plus_one=form != "gptq_v2")
        scheme = Scheme(bits, 32, DType.float16, "zeros")
        assert_holds(checkpoint, module, expected, f"gptq-q{bits}", scheme)
        assert (checkpoint.load(f"{module}.weight").columns is not None) == act_order


def test_gptq_of_whole_rows_and_without_groups_of_columns(tmp_path, rng):
    arrays = gptq(rng, shape_of(UP), 128)
    expected = read_gptq(arrays)
    del arrays["g_idx"]
    checkpoint = open_checkpoint(write_quantized(tmp_path, {UP: arrays}, GPTQ | {"group_size": -1}))
    assert_holds(checkpoint, UP, expected, "gptq-q4", q4(128, symmetric=False))


def test_rows_of_an_act_order_matrix_are_rows_of_the_matrix(tmp_path, rng):
    arrays = gptq(rng, shape_of(UP), 32, act_order=True)
    loaded = open_checkpoint(write_quantized(tmp_path, {UP: arrays}, GPTQ)).load(f"{UP}.weight")
    assert loaded[7:19].dequantize().tobytes() == read_gptq(arrays)[7:19].tobytes()
    assert sorted(loaded.columns) == list(range(128))


@pytest.mark.parametrize("unpack", [rows_of_awq, rows_of_gptq])
def test_transposing_takes_little_memory_beside_the_result(unpack):
    words = np.zeros((512, 4096), np.int32)
    tracemalloc.start()
    rows = unpack(words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.nbytes == words.nbytes
    assert peak < rows.nbytes + (1 << 20)


# --- FP8 --------------------------------------------------------------------------------------------------


def e4m3_values(numbers, scales):
    """Scales broadcast to numbers, multiplied in float32."""
    return numbers.astype(np.float32) * np.asarray(scales, np.float32)


@pytest.mark.parametrize("shape", [(), (1,), (256,), (256, 1)], ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_fp8_of_tensors_and_rows(tmp_path, rng, shape, dtype, caplog):
    numbers = random_e4m3(rng, shape_of(UP))
    scales = np.asarray(rng.normal(0, 0.01, shape)).astype(dtype)
    parts = {UP: {"weight": numbers, "weight_scale": scales, "input_scale": np.ones(1, np.float32)}}
    with caplog.at_level(logging.INFO):
        checkpoint = open_checkpoint(write_quantized(tmp_path, parts, FP8))
    assert "1 scales of activations" in caplog.text
    of_rows = scales.reshape(-1, 1) if scales.size > 1 else scales.reshape(())
    scheme = Scheme(8, 128, DType.float32, "e4m3")
    assert_holds(checkpoint, UP, e4m3_values(numbers, of_rows), "fp8-e4m3", scheme)


@pytest.mark.parametrize(
    ("block", "hidden", "kept"),
    [([128, 128], 256, 128), ([128, 128], 160, 32), ([64, 96], 192, 32), (None, 256, 128)],
)
def test_fp8_in_blocks_which_may_be_cut_off(tmp_path, rng, block, hidden, kept):
    config = CONFIG | {"hidden_size": hidden, "intermediate_size": 320, "num_hidden_layers": 1}
    numbers = random_e4m3(rng, (320, hidden))
    stated, block = {"weight_block_size": block}, block or [128, 128]
    count = -(-320 // block[0]), -(-hidden // block[1])
    scales = rng.normal(0, 0.01, count).astype(np.float32)
    parts = {UP: {"weight": numbers, "weight_scale_inv": scales}}
    checkpoint = open_checkpoint(write_quantized(tmp_path, parts, FP8 | stated, config))
    expected = np.empty((320, hidden), np.float32)
    for n in range(320):
        for k in range(hidden):
            expected[n, k] = np.float32(numbers[n, k]) * scales[n // block[0], k // block[1]]
    assert_holds(checkpoint, UP, expected, "fp8-e4m3", Scheme(8, kept, DType.float32, "e4m3"))


def test_numbers_that_are_nan_are_counted(tmp_path, rng):
    numbers = random_e4m3(rng, shape_of(UP))
    numbers[3, 4:6] = np.nan
    parts = {UP: {"weight": numbers, "weight_scale": np.ones(1, np.float32)}}
    checkpoint = open_checkpoint(write_quantized(tmp_path, parts, FP8))
    assert find_bad_tensors(checkpoint) == [BadTensor(f"{UP}.weight", 2, 0)]


def test_e4m3_is_read_as_the_format_says():
    """1 bit of sign, 4 of exponent with bias 7, 3 of mantissa; no infinities; 127 and 255 are NaN."""
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    for code, number in enumerate(numbers.tolist()):
        sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
        if code & 127 == 127:
            assert number != number
        elif exponent == 0:
            assert number == sign * mantissa * 2.0**-9
        else:
            assert number == sign * (8 + mantissa) * 2.0 ** (exponent - 10)


# --- compressed-tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scales", [np.float16, BFLOAT16])
def test_packed_integers(tmp_path, rng, bits, symmetric, act_order, scales):
    options = {"symmetric": symmetric, "act_order": act_order, "scales": scales}
    parts = {module: packed_int(rng, shape_of(module), 32, bits, **options) for module in MODULES}
    config = compressed("pack-quantized", num_bits=bits, strategy="group", group_size=32)
    checkpoint = open_checkpoint(write_quantized(tmp_path, parts, config))
    kept = DType.float16 if scales == np.float16 else DType.float32
    for module, arrays in parts.items():
        scheme = Scheme(bits, 32, kept, "middle" if symmetric else "zeros")
        assert_holds(checkpoint, module, read_packed_int(arrays, 32, bits), f"int{bits}", scheme)


def test_packed_integers_are_views_with_scales_of_whole_rows(tmp_path, rng):
    arrays = packed_int(rng, shape_of(DOWN), 256, 4, scales=np.float16)
    checkpoint = open_checkpoint(write_quantized(tmp_path, {DOWN: arrays}, PACKED))
    assert_holds(checkpoint, DOWN, read_packed_int(arrays, 256, 4), "int4", q4(128))
    name = f"{DOWN}.weight"
    assert np.shares_memory(checkpoint.load(name).codes.data, checkpoint.load(name).codes.data)


@pytest.mark.parametrize("shape", [(1,), (256, 1), (256, 4)], ids=repr)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_int8(tmp_path, rng, shape, symmetric, act_order):
    values = rng.integers(-128, 128, shape_of(UP)).astype(np.int8)
    scales = rng.normal(0, 0.01, shape).astype(BFLOAT16)
    arrays = {"weight": values, "weight_scale": scales}
    count = shape[1] if len(shape) == 2 else 1
    groups = np.arange(128) // (128 // count)
    if not symmetric:
        arrays["weight_zero_point"] = rng.integers(-128, 128, shape).astype(np.int8)
    if act_order:
        groups = rng.permutation(groups)
        arrays["weight_g_idx"] = groups.astype(np.int32)
    config = compressed("int-quantized", num_bits=8)
    checkpoint = open_checkpoint(write_quantized(tmp_path, {UP: arrays}, config))
    of_columns = np.broadcast_to(scales.astype(np.float32).reshape(-1, count), (256, count))[:, groups]
    shifted = values.astype(np.float32)
    if not symmetric:
        zeros = arrays["weight_zero_point"].astype(np.float32).reshape(-1, count)
        shifted -= np.broadcast_to(zeros, (256, count))[:, groups]
    scheme = Scheme(8, 32 if count > 1 else 128, DType.float32, "middle" if symmetric else "zeros")
    assert_holds(checkpoint, UP, shifted * of_columns, "int8", scheme)


@pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("channel", (256, 1)), ("block", (2, 1))])
def test_fp8_of_compressed_tensors(tmp_path, rng, strategy, shape):
    numbers, scales = random_e4m3(rng, shape_of(UP)), rng.normal(0, 0.01, shape).astype(BFLOAT16)
    block = {"block_structure": "128x128"} if strategy == "block" else {}
    config = compressed("float-quantized", type="float", num_bits=8, strategy=strategy, **block)
    arrays = {
        "weight": numbers,
        "weight_scale": scales,
        "input_scale": np.ones(1, np.float32),
        "weight_zero_point": np.zeros(shape, E4M3),
    }
    checkpoint = open_checkpoint(write_quantized(tmp_path, {UP: arrays}, config))
    of_rows = np.repeat(scales.astype(np.float32), 256 // shape[0], axis=0).reshape(-1, 1)
    expected = numbers.astype(np.float32) * of_rows
    assert_holds(checkpoint, UP, expected, "fp8-e4m3", Scheme(8, 128, DType.float32, "e4m3"))


# --- our own ----------------------------------------------------------------------------------------------

OUR_SCHEMES = [
    q8(64),
    q8(32, DType.float32),
    q4(32),
    q4(128),
    q4(64, symmetric=False),
]


@pytest.mark.parametrize("scheme", OUR_SCHEMES, ids=repr)
def test_what_is_encoded_is_read_back(tmp_path, rng, scheme):
    weights = {
        module: quantize(rng.normal(0, 0.1, shape_of(module)).astype(np.float32), scheme)
        for module in MODULES
    }
    parts = {}
    for module, weight in weights.items():
        arrays = ours.encode(weight)
        described = ours.parts_of(scheme, *weight.shape)
        for part, array in zip(described, arrays, strict=True):
            assert (array.shape, array.dtype) == (part.shape, part.dtype.numpy)
        parts[module] = {f"weight{part.suffix}": array for part, array in zip(described, arrays, strict=True)}
    checkpoint = open_checkpoint(write_quantized(tmp_path, parts, ours.config_of(scheme)))
    assert ours.can_store(scheme)
    for module, weight in weights.items():
        assert_holds(checkpoint, module, weight.dequantize(), scheme.name, scheme)


def test_our_bytes_are_as_documented(tmp_path):
    """Small numbers whose bytes are written down here."""
    config = CONFIG | {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    row = [0x10, 0x32, 0x54, 0xF6]  # codes 0, 1, 2, 3, 4, 5, 6, 15
    parts = {
        UP: {
            "weight": np.array([row] * 4, np.uint8),
            "weight_scale": np.array([[0.5, 2]] * 4, np.float16),
        },
        "model.layers.0.mlp.gate_proj": {
            "weight": np.array([row] * 4, np.uint8),
            "weight_scale": np.array([[0.5, 2]] * 4, np.float16),
            "weight_zero": np.array([[1, 4]] * 4, np.uint8),
        },
        DOWN: {
            "weight": np.array([[127, -127, 0, -128]] * 8, np.int8),
            "weight_scale": np.array([[0.25]] * 8, np.float16),
        },
    }
    checkpoint = open_checkpoint(write_quantized(tmp_path, parts, OURS | {"bits": 8}, config))

    def row_of(module):
        return checkpoint.load(f"{module}.weight").dequantize()[0].tolist()

    assert row_of(UP) == [-4, -3.5, -3, -2.5, -8, -6, -4, 14]
    assert row_of("model.layers.0.mlp.gate_proj") == [-0.5, 0, 0.5, 1, 0, 2, 4, 22]
    assert row_of(DOWN) == [31.75, -31.75, 0, -32]


@pytest.mark.parametrize(
    "scheme", [Scheme(6, 32), Scheme(4, 32, DType.int8, "minimum"), Scheme(8, 32, DType.float16, "zeros")]
)
def test_schemes_that_have_no_place_in_our_files(scheme):
    assert not ours.can_store(scheme)


def test_tied_embeddings_are_quantized_once(tmp_path, rng):
    config = WIDE | {"tie_word_embeddings": True}
    weight = quantize(rng.normal(0, 0.1, (20, 128)).astype(np.float32), q8(64))
    values, scales = ours.encode(weight)
    arrays = {"weight": values, "weight_scale": scales}
    parts = {"model.embed_tokens": arrays, "lm_head": arrays}
    checkpoint = open_checkpoint(write_quantized(tmp_path, parts, ours.config_of(q8(64)), config))
    assert not any(name.startswith("lm_head") for name in checkpoint.tensors)
    assert_holds(checkpoint, "model.embed_tokens", weight.dequantize(), "q8", q8(64))


# --- what is refused --------------------------------------------------------------------------------------


def broken(arrays, **changes):
    """Arrays with some replaced; None takes one away."""
    changed = arrays | changes
    return {suffix: array for suffix, array in changed.items() if array is not None}


def wrong_files():
    rng = np.random.default_rng(1)
    shape = shape_of(UP)
    a, g, p = awq(rng, shape, 32), gptq(rng, shape, 32, act_order=True), packed_int(rng, shape, 32, 4)
    f = {"weight": random_e4m3(rng, shape), "weight_scale": np.ones((256, 1), np.float32)}
    w = dict(
        zip(
            ("weight", "weight_scale"), ours.encode(quantize(np.ones(shape, np.float32), q4(32))), strict=True
        )
    )
    z = np.zeros
    return {
        "awq without scales": (AWQ, broken(a, scales=None), "tensor .*up_proj.scales' is missing"),
        "awq scales of another shape": (
            AWQ,
            broken(a, scales=a["scales"][:, :8]),
            r"\[4, 8\], .* ask for \[4, 256\]",
        ),
        "awq zeros of another shape": (
            AWQ,
            broken(a, qzeros=a["qzeros"][:3]),
            r"\[3, 32\], .* ask for \[4, 32\]",
        ),
        "awq groups that do not divide": (
            AWQ | {"group_size": 48},
            a,
            "has 4 scales for each row of 128 weights, in groups of 48 as the configuration says",
        ),
        "awq three scales": (
            AWQ,
            broken(a, scales=a["scales"][:3], qzeros=a["qzeros"][:3]),
            "has 3 scales for each row of 128 weights",
        ),
        "awq of floats": (AWQ, broken(a, qweight=a["qweight"].astype(np.float32)), "qweight' is float32"),
        "awq of one dimension": (AWQ, broken(a, qweight=a["qweight"][0]), r"shape \[32\]; 2 dimensions"),
        "awq of nothing": (AWQ, broken(a, qweight=z((0, 32), np.int32)), "none of them 0"),
        "awq of odd rows": (
            AWQ | {"group_size": -1},
            {
                "qweight": z((3, 2), np.int32),
                "qzeros": z((1, 2), np.int32),
                "scales": z((1, 16), np.float16),
            },
            "rows of 3 weights is not supported",
        ),
        "awq 3 bits": (AWQ | {"bits": 3}, a, "AWQ with 3 bits is not supported; supported: 4 bits"),
        "awq gemv": (AWQ | {"version": "gemv"}, a, "AWQ with version 'gemv' is not supported"),
        "awq version 7": (AWQ | {"version": 7}, a, "AWQ with version 7 is not supported"),
        "awq of llm-awq": (AWQ | {"backend": "llm-awq"}, a, "the layout of 'llm-awq'"),
        "awq group size 0": (AWQ | {"group_size": 0}, a, "group_size must be -1 or at least 1, not 0"),
        "awq group size text": (AWQ | {"group_size": "32"}, a, "group_size must be"),
        "awq scales not a number": (
            AWQ,
            broken(a, scales=np.full_like(a["scales"], np.nan)),
            "up_proj.weight has scales that are NaN or infinite",
        ),
        "awq scales infinite": (
            AWQ,
            broken(a, scales=np.full_like(a["scales"], np.inf)),
            "up_proj.weight has scales that are NaN or infinite",
        ),
        "awq beside the weights themselves": (
            AWQ,
            broken(a, weight=z(shape, np.float16)),
            "is there both as it is and quantized",
        ),
        "gptq 3 bits": (GPTQ | {"bits": 3}, g, "GPTQ with 3 bits is not supported"),
        "gptq 4.0 bits": (GPTQ | {"bits": 4.0}, g, "GPTQ with 4.0 bits is not supported"),
        "gptq marlin": (GPTQ | {"checkpoint_format": "marlin"}, g, "the format 'marlin' is not"),
        "gptq old marlin": (GPTQ | {"is_marlin_format": True}, g, "the format 'marlin' is not"),
        "gptq 8 bits said of 4": (GPTQ | {"bits": 8}, g, "qzeros' has the shape"),
        "gptq groups that do not exist": (
            GPTQ,
            broken(g, g_idx=g["g_idx"] + 1),
            "up_proj.weight: g_idx has groups from 1 to 4, of 4",
        ),
        "gptq negative groups": (GPTQ, broken(g, g_idx=g["g_idx"] - 1), "g_idx has groups from -1 to 2"),
        "gptq uneven groups": (
            GPTQ,
            broken(g, g_idx=np.minimum(g["g_idx"], 2)),
            "its groups have from 0 to 64 columns; groups of 32 are supported",
        ),
        "gptq groups of other columns": (
            GPTQ,
            broken(g, g_idx=g["g_idx"][:99]),
            r"\[99\], .* ask for \[128\]",
        ),
        "fp8 numbers without scales": (FP8, {"weight": f["weight"]}, "is float8_e4m3fn without scales"),
        "fp8 numbers without configuration": (None, f, r"no quantization_config, .* \(float8_e4m3fn\)"),
        "fp8 e5m2": (FP8 | {"fmt": "e5m2"}, f, "FP8 with numbers of 'e5m2' is not supported"),
        "fp8 e5m2 numbers": (
            FP8,
            broken(f, weight=z(shape, np.uint8).view(ml_dtypes.float8_e5m2)),
            "up_proj.weight' is float8_e5m2",
        ),
        "fp8 scales of other rows": (
            FP8,
            broken(f, weight_scale=z((255, 1), np.float32)),
            r"\[255, 1\], .* ask for \[256, 1\]",
        ),
        "fp8 integer scales": (FP8, broken(f, weight_scale=z((256, 1), np.int32)), "weight_scale' is int32"),
        "fp8 blocks of text": (FP8 | {"weight_block_size": "all"}, f, "weight_block_size must be two whole"),
        "fp8 blocks of 0": (FP8 | {"weight_block_size": [0, 128]}, f, "weight_block_size must be two whole"),
        "fp8 other blocks": (
            FP8 | {"weight_block_size": [128, 128]},
            {"weight": f["weight"], "weight_scale_inv": z((3, 1), np.float32)},
            r"\[3, 1\], .* ask for \[2, 1\]",
        ),
        "packed without groups": (PACKED | {"config_groups": {}}, p, "config_groups must describe groups"),
        "packed without weights": (PACKED | {"config_groups": {"a": {}}}, p, "does not say how weights"),
        "packed in an unknown format": (PACKED | {"format": "nvfp4-pack-quantized"}, p, "the format 'nvfp4"),
        "packed and sparse": (
            PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            p,
            "sparse weights",
        ),
        "packed in 3 bits": (compressed("pack-quantized", num_bits=3), p, "weights of 3 bits, 'int'"),
        "packed fp4": (compressed("pack-quantized", type="float"), p, "weights of 4 bits, 'float'"),
        "packed 4 and 8 bits": (
            PACKED
            | {
                "config_groups": {
                    str(bits): {"weights": {"num_bits": bits, "type": "int"}} for bits in (4, 8)
                }
            },
            p,
            "integers of 4 and of 8 bits in one file",
        ),
        "packed scales of other rows": (
            PACKED,
            broken(p, weight_scale=p["weight_scale"][:7]),
            r"\[7, 4\], .* ask for \[256, 4\]",
        ),
        "packed five scales": (
            PACKED,
            broken(p, weight_scale=z((256, 5), np.float16)),
            "has 5 scales for each row of 128 weights",
        ),
        "scales of weights that are floats": (
            compressed("float-quantized", type="float", num_bits=8),
            {"weight": z(shape, np.float16), "weight_scale": z((256, 1), np.float16)},
            "up_proj.weight' is float16, which is not supported here",
        ),
        "ours with 5 bits": (OURS | {"bits": 5}, w, "kuiper with 5 bits is not supported"),
        "ours of floats": (
            OURS,
            broken(w, weight=z(shape, np.float16)),
            "is float16, which is not supported",
        ),
        "ours with zeros of int8 values": (
            OURS,
            {
                "weight": z(shape, np.int8),
                "weight_scale": z((256, 4), np.float16),
                "weight_zero": z((256, 4), np.uint8),
            },
            "has int8 values and zero points",
        ),
        "ours with other zeros": (OURS, broken(w, weight_zero=z((256, 3), np.uint8)), r"\[256, 3\]"),
        "ours with bfloat16 scales": (
            OURS,
            broken(w, weight_scale=w["weight_scale"].astype(BFLOAT16)),
            "weight_scale' is bfloat16",
        ),
        "ours with scales that do not divide": (
            OURS,
            broken(w, weight_scale=z((256, 7), np.float16)),
            "has 7 scales for each row of 128",
        ),
        "another method": ({"quant_method": "bitsandbytes"}, a, "quantized with 'bitsandbytes' are not"),
        "a method that is no text": ({"quant_method": ["awq"]}, a, "quantized with "),
        "a method alone": ("awq", a, "quantization_config must be an object, not 'awq'"),
        "no method": (None, a, "has no quantization_config, but tensor .*up_proj.qweight' is quantized"),
    }


WRONG = wrong_files()


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_line(tmp_path, case):
    config, arrays, message = WRONG[case]
    with pytest.raises(KuiperError, match=message) as caught:
        open_checkpoint(write_quantized(tmp_path, {UP: arrays}, config)).load(f"{UP}.weight")
    assert isinstance(caught.value, CheckpointError | ConfigError | UnsupportedError)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    assert str(tmp_path) in text


def test_checkpoints_that_are_not_quantized_are_as_before(tmp_path):
    folder = write_folder(tmp_path, make_tensors(), CONFIG | {"quantization_config": None})
    assert set(open_checkpoint(folder).tensors) == set(make_tensors())
