"""Quantized exports: values as other packages read them, codes that are kept, errors as reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from export_readers import gguf_names, interleaved, read_folder, read_gguf, rotary_heads

from kuiperllm import LLM, SamplingParams, UnsupportedError, export
from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.checkpoint.writing.gguf_types import MIXTURES, find_mixture, tensor_type
from kuiperllm.config import ModelConfig
from kuiperllm.engine.export.report import relative_error
from kuiperllm.quant import QuantTensor
from tiny_models import BASE, Weights, chain_weights, random_weights, write_checkpoint

WIDE = BASE | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 260}
TIED = WIDE | {"tie_word_embeddings": True}
# Rounding in groups of normal numbers: bounds a tenth above what is found, and none may be 0.
BOUNDS = {
    "q8_0": 0.006,
    "q4_0": 0.095,
    "q4_1": 0.085,
    "q5_0": 0.047,
    "q5_1": 0.042,
    "q2_k": 0.33,
    "q3_k_s": 0.18,
    "q3_k_m": 0.15,
    "q3_k_l": 0.13,
    "q4_k_s": 0.09,
    "q4_k_m": 0.085,
    "q5_k_s": 0.045,
    "q5_k_m": 0.043,
    "q6_k": 0.025,
}


def source(folder: Path, config: dict[str, Any] = WIDE, weights: Weights | None = None) -> Path:
    return write_checkpoint(folder / "source", config, weights or random_weights(config))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(
        np.sqrt(((found - expected) ** 2).sum(dtype=np.float64) / (expected**2).sum(dtype=np.float64))
    )


def of_codes(arrays: Weights, name: str) -> np.ndarray:
    """A matrix of our own scheme, as docs/formats.md says."""
    stored, scales = arrays[name], arrays[f"{name}_scale"].astype(np.float32)
    if stored.dtype == np.int8:
        codes, zeros = stored.astype(np.float32), np.float32(0)
    else:
        codes = np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), -1).astype(np.float32)
        zeros = np.float32(8)
    groups = codes.reshape(*scales.shape, -1)
    if f"{name}_zero" in arrays:
        zeros = arrays[f"{name}_zero"].astype(np.float32)[:, :, None]
    return ((groups - zeros) * scales[:, :, None]).reshape(codes.shape)


# --- our own scheme ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize(
    ("quant", "zero_point", "bound"), [("q8", False, 0.007), ("q4", False, 0.105), ("q4", True, 0.1)]
)
def test_safetensors(
    tmp_path: Path, quant: str, zero_point: bool, bound: float, group_size: int | None
) -> None:
    model = source(tmp_path)
    report = export(model, tmp_path / "out", quant=quant, group_size=group_size, zero_point=zero_point)
    groups = group_size or (32 if quant == "q4" else 64)
    config, arrays = read_folder(tmp_path / "out")
    assert config["quantization_config"] == {
        "quant_method": "kuiper",
        "bits": int(quant[1]),
        "group_size": groups,
        "zero_point": zero_point,
    }
    reported = {tensor.name: tensor for tensor in report.tensors}
    with open_checkpoint(tmp_path / "out") as checkpoint:
        for name, tensor in random_weights(WIDE).items():
            loaded = checkpoint.load(name)
            if tensor.ndim == 1:
                assert loaded.tobytes() == arrays[name].tobytes() == tensor.tobytes()
                continue
            assert isinstance(loaded, QuantTensor)
            values = of_codes(arrays, name)
            assert loaded.dequantize().tobytes() == values.tobytes(), name
            assert 0 < difference(values, tensor) < bound
            assert reported[name].relative_error == pytest.approx(difference(values, tensor), rel=1e-4)
            assert reported[name].max_error == pytest.approx(np.abs(values - tensor).max(), rel=1e-6)
            bits = int(quant[1]) + (24 if zero_point else 16) / groups
            assert reported[name].bits_per_weight == pytest.approx(bits)
            largest = np.abs(arrays[f"{name}_scale"].astype(np.float32)).max()
            assert reported[name].max_error <= largest
    total = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert report.out_bytes == total
    assert report.relative_error == pytest.approx(relative_error(report.matrices))


def test_search_leaves_less_error(tmp_path: Path) -> None:
    model = source(tmp_path)
    by_rule = export(model, tmp_path / "a", quant="q4")
    searched = export(model, tmp_path / "b", quant="q4", search=True)
    assert searched.relative_error < 0.97 * by_rule.relative_error
    for before, after in zip(by_rule.matrices, searched.matrices, strict=True):
        assert after.relative_error < before.relative_error


def test_rows_that_groups_do_not_divide_stay_floating_point(tmp_path: Path) -> None:
    config = WIDE | {"intermediate_size": 208}
    report = export(source(tmp_path, config), tmp_path / "out", quant="q8", group_size=128)
    _, arrays = read_folder(tmp_path / "out")
    weights = random_weights(config)
    down = "model.layers.0.mlp.down_proj.weight"
    assert arrays[down].tobytes() == weights[down].tobytes()
    assert arrays["model.layers.0.mlp.up_proj.weight"].dtype == np.int8
    assert report.notes == (
        "2 of 16 matrices stayed floating-point: groups do not divide their rows of 208 weights",
    )
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    LLM(tmp_path / "out", device="cpu").generate("ab", params)


@pytest.mark.parametrize("out", ["out", "m.gguf"])
@pytest.mark.parametrize("quant", ["q8", "q4"])
def test_a_quantized_model_writes_as_before(tmp_path: Path, out: str, quant: str) -> None:
    """Of this model every weight is 0 or 1, which q8 and q4 hold exactly."""
    following = {i: (i * 7 + 3) % 260 for i in range(260)}
    config = BASE | {"hidden_size": 512, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 260}
    model = source(tmp_path, config, chain_weights(config, following))
    export(model, tmp_path / out, quant=quant)
    export(tmp_path / out, tmp_path / "floats", quant="none")
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    texts = [
        list(LLM(m, device="cpu").generate([[97]], params)[0].token_ids) for m in (model, tmp_path / "floats")
    ]
    assert texts[0] == texts[1]
    assert texts[0][:2] == [following[97], following[following[97]]]


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = source(tmp_path, TIED)
    export(model, tmp_path / "out", quant="q8")
    export(model, tmp_path / "m.gguf", quant="q8")
    config, arrays = read_folder(tmp_path / "out")
    assert config["tie_word_embeddings"]
    assert not [name for name in arrays if name.startswith("lm_head")]
    _, tensors, _ = read_gguf(tmp_path / "m.gguf")
    assert "output.weight" not in tensors
    for out in ("out", "m.gguf"):
        assert open_checkpoint(tmp_path / out).config.tie_word_embeddings


# --- GGUF -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", MIXTURES)
def test_gguf_types(tmp_path: Path, quant: str) -> None:
    model = source(tmp_path)
    report = export(model, tmp_path / "m.gguf", quant=quant)
    keys, tensors, types = read_gguf(tmp_path / "m.gguf")
    file_type = gguf.LlamaFileType(keys["general.file_type"])
    assert file_type.name == f"MOSTLY_{quant.upper()}"
    assert keys["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    weights = random_weights(WIDE)
    names = gguf_names("llama", weights, WIDE["num_hidden_layers"])
    reported = {tensor.name: tensor for tensor in report.tensors}
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        for name, tensor in weights.items():
            if tensor.ndim == 1:
                assert types[names[name]] == "F32"
                continue
            heads = rotary_heads(WIDE, name)
            found = tensors[names[name]]
            loaded = checkpoint.load(name).dequantize()
            assert (interleaved(loaded, heads) if heads else loaded).tobytes() == found.tobytes()
            expected = interleaved(tensor, heads) if heads else tensor
            assert reported[name].stored == types[names[name]]
            assert reported[name].relative_error == pytest.approx(difference(found, expected), rel=1e-4)
    assert 0 < report.relative_error < BOUNDS[quant]


def test_mixtures_spend_bits_where_llama_quantize_does() -> None:
    """For 32 layers and 4 heads of queries to one of keys, by the rules in llama.cpp's llama-quant.cpp."""
    config = ModelConfig.from_hf(WIDE | {"num_hidden_layers": 32, "num_key_value_heads": 1})
    more = [*range(4), *range(6, 28, 3), *range(28, 32)]

    def layers(quant: str, part: str, kind: str) -> list[int]:
        def of(i: int) -> str | None:
            name = f"model.layers.{i}.{part}_proj.weight"
            return tensor_type(find_mixture(quant), name, (256, 256), config)

        return [i for i in range(32) if of(i) == kind]

    every = list(range(32))
    assert layers("q4_k_m", "self_attn.v", "Q6_K") == layers("q4_k_m", "mlp.down", "Q6_K") == more
    assert layers("q5_k_m", "self_attn.v", "Q6_K") == layers("q5_k_m", "mlp.down", "Q6_K") == more
    assert layers("q4_k_s", "self_attn.v", "Q5_K") == layers("q4_k_s", "mlp.down", "Q5_K") == [0, 1, 2, 3]
    assert layers("q4_k_m", "mlp.up", "Q4_K") == layers("q4_k_m", "self_attn.q", "Q4_K") == every
    assert layers("q2_k", "self_attn.v", "Q4_K") == layers("q2_k", "mlp.down", "Q3_K") == every
    assert layers("q2_k", "self_attn.o", "Q3_K") == layers("q2_k", "mlp.gate", "Q2_K") == every
    assert layers("q3_k_m", "self_attn.v", "Q5_K") == layers("q3_k_m", "mlp.down", "Q5_K") == [0, 1]
    assert layers("q3_k_m", "self_attn.o", "Q4_K") == layers("q3_k_l", "self_attn.o", "Q5_K") == every
    for quant, output in (("q4_k_m", "Q6_K"), ("q4_0", "Q6_K"), ("q8_0", "Q8_0"), ("q5_k_s", "Q6_K")):
        assert tensor_type(find_mixture(quant), "lm_head.weight", (260, 256), config) == output
    embedding = "model.embed_tokens.weight"
    assert tensor_type(find_mixture("q4_k_m"), embedding, (260, 256), config) == "Q4_K"
    tied = ModelConfig.from_hf(TIED)
    assert tensor_type(find_mixture("q4_k_m"), embedding, (260, 256), tied) == "Q6_K"


def test_rows_without_blocks_of_256(tmp_path: Path) -> None:
    config = WIDE | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 176}
    report = export(source(tmp_path, config), tmp_path / "m.gguf", quant="q4_k_m", dtype="float16")
    _, _, types = read_gguf(tmp_path / "m.gguf")
    assert types["blk.0.attn_q.weight"] == "Q5_0"  # what llama-quantize takes for Q4_K
    assert types["output.weight"] == types["blk.1.attn_v.weight"] == "Q8_0"  # for Q6_K
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert "2 of 16 matrices stayed floating-point" in report.notes[0]


# --- codes that are kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["keep", "q8"])
def test_q8_0_and_our_q8_have_the_same_codes(tmp_path: Path, quant: str) -> None:
    export(source(tmp_path), tmp_path / "a.gguf", quant="q8")
    report = export(
        tmp_path / "a.gguf", tmp_path / "out", quant=quant, group_size=None if quant == "keep" else 32
    )
    assert report.max_error == 0
    with open_checkpoint(tmp_path / "a.gguf") as before, open_checkpoint(tmp_path / "out") as after:
        for name in before.tensors:
            first, second = before.load(name), after.load(name)
            if isinstance(first, QuantTensor):
                assert (first.codes.unpack() == second.codes.unpack()).all()
                assert (first.scales == second.scales).all()
    export(tmp_path / "out", tmp_path / "b.gguf", quant=quant)
    _, first_values, first_types = read_gguf(tmp_path / "a.gguf")
    _, second_values, second_types = read_gguf(tmp_path / "b.gguf")
    assert first_types == second_types
    assert all(first_values[name].tobytes() == second_values[name].tobytes() for name in first_values)


@pytest.mark.parametrize(("quant", "type_name"), [("q8", "Q8_0"), ("q4", "Q4_0")])
def test_wider_groups_become_blocks_of_32(tmp_path: Path, quant: str, type_name: str) -> None:
    export(source(tmp_path), tmp_path / "out", quant=quant, group_size=128)
    report = export(tmp_path / "out", tmp_path / "m.gguf")
    assert report.max_error == 0
    assert {t.stored for t in report.matrices} == {type_name}
    again = export(tmp_path / "m.gguf", tmp_path / "again", quant="keep")
    assert again.max_error == 0


def test_symmetric_codes_gain_zero_points(tmp_path: Path) -> None:
    export(source(tmp_path), tmp_path / "out", quant="q4", group_size=64)
    report = export(tmp_path / "out", tmp_path / "zero", quant="q4", group_size=32, zero_point=True)
    assert report.max_error == 0
    _, arrays = read_folder(tmp_path / "zero")
    assert (arrays["lm_head.weight_zero"] == 8).all()


@pytest.mark.parametrize("version", [2, 3])
def test_int8_of_llama2c_keeps_its_codes(tmp_path: Path, version: int) -> None:
    config = WIDE | {"bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5}
    first = source(tmp_path, config)
    export(first, tmp_path / "m.bin", version=version, group_size=64)
    report = export(tmp_path / "m.bin", tmp_path / "out", tokenizer=first)
    assert report.max_error == 0  # scales stay float32
    again = export(tmp_path / "out", tmp_path / "again.bin", version=version, group_size=64)
    assert again.max_error == 0
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()
    halved = export(tmp_path / "m.bin", tmp_path / "half", quant="q8", group_size=64, tokenizer=first)
    rounded = [tensor for tensor in halved.matrices if tensor.source == "q8"]
    assert 0 < relative_error(rounded) < 2**-11  # scales are rounded to float16, codes are the same
    with open_checkpoint(tmp_path / "m.bin") as before, open_checkpoint(tmp_path / "half") as after:
        name = "model.layers.1.mlp.up_proj.weight"
        assert (before.load(name).codes.unpack() == after.load(name).codes.unpack()).all()


def test_floating_point_from_codes_is_exact_in_float32(tmp_path: Path) -> None:
    export(source(tmp_path), tmp_path / "a.gguf", quant="q4_k_m")
    report = export(tmp_path / "a.gguf", tmp_path / "out", quant="none")
    assert report.max_error == 0
    with open_checkpoint(tmp_path / "a.gguf") as before, open_checkpoint(tmp_path / "out") as after:
        for name in before.tensors:
            first, second = before.load(name), after.load(name)
            values = first.dequantize() if isinstance(first, QuantTensor) else first
            assert values.tobytes() == second.tobytes()


def test_a_gguf_source_passes_on_what_it_says_of_itself(tmp_path: Path) -> None:
    config = WIDE | {"vocab_size": 4}
    shapes = {gguf_names("llama", [name], 2)[name]: tensor for name, tensor in random_weights(config).items()}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_name("A name")
    writer.add_author("Somebody")
    writer.add_languages(["en", "zh"])
    writer.add_custom_alignment(64)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(2)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 1])
    for name, tensor in shapes.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    export(tmp_path / "a.gguf", tmp_path / "b.gguf", quant="q8")
    before, _, _ = read_gguf(tmp_path / "a.gguf")
    after, _, _ = read_gguf(tmp_path / "b.gguf")
    for key in ("general.name", "general.author", "general.languages"):
        assert after[key] == before[key]
    assert "general.alignment" not in after
    tokenizer = [key for key in before if key.startswith("tokenizer.")]
    assert {key: after[key] for key in tokenizer} == {key: before[key] for key in tokenizer}


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    export(source(tmp_path), tmp_path / "a.gguf", quant="q4_k_m")
    with pytest.raises(
        UnsupportedError, match=r"is Q4_K, which safetensors cannot hold as it is; choose --quant"
    ):
        export(tmp_path / "a.gguf", tmp_path / "out")
    export(tmp_path / "source", tmp_path / "zero", quant="q4", zero_point=True)
    with pytest.raises(UnsupportedError, match="which GGUF cannot hold as it is"):
        export(tmp_path / "zero", tmp_path / "b.gguf")
    kept = export(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert kept.max_error == 0
    first, second = read_gguf(tmp_path / "a.gguf"), read_gguf(tmp_path / "b.gguf")
    assert first[2] == second[2]
    assert first[0]["general.file_type"] == second[0]["general.file_type"]
