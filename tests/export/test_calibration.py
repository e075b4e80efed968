"""Exports that are calibrated with a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuiperllm import LLM, CheckpointError, UsageError, compare, export
from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.config import ModelConfig
from kuiperllm.engine.export import calibration
from kuiperllm.engine.export.calibration import Calibrated, Sums, calibration_windows
from kuiperllm.quant import QuantTensor, q4
from kuiperllm.text import load_tokenizer
from reference_llama import reference_logits
from tiny_models import BASE, BOS, random_weights, write_checkpoint

WIDE = BASE | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 260}
QWEN2 = WIDE | {"model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = WIDE | {"model_type": "qwen3", "head_dim": 64}
BIASED = WIDE | {"attention_bias": True, "mlp_bias": True}
FAMILIES = {"llama": WIDE, "qwen2": QWEN2, "qwen3": QWEN3, "biased": BIASED}

TEXT = "".join(
    f"{a} {b} of the {c}, that the {d} may {b}.\n"
    for a in ("He", "She", "They", "We")
    for b in ("speaks", "sings", "tells", "dreams")
    for c in ("river", "mountains", "sea", "old house")
    for d in ("children", "people", "birds")
)


def model(folder: Path, config: dict[str, Any] = WIDE) -> Path:
    return write_checkpoint(folder / "source", config, random_weights(config))


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_the_network_is_the_one_that_the_engine_runs(tmp_path: Path, config: dict[str, Any]) -> None:
    """Inputs of matrices are looked at on the way; what comes out at the end is as it should be."""
    ids = np.random.default_rng(0).integers(0, 260, (2, 40), np.int32)
    weights = random_weights(config)
    with open_checkpoint(model(tmp_path, config)) as checkpoint:
        layers = calibration._Layers(checkpoint, ids)
        found = dict(layers)
    norm, head = weights["model.norm.weight"], weights.get("lm_head.weight")
    head = weights["model.embed_tokens.weight"] if head is None else head
    for row, residual in zip(ids, layers._residual, strict=True):
        x = residual / np.sqrt((residual**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * norm
        expected = reference_logits(ModelConfig.from_hf(config), weights, row.tolist(), dtype=np.float64)
        np.testing.assert_allclose(x @ head.T, expected, atol=2e-3 * np.abs(expected).max())
    assert list(found) == [0, 1]
    embedded = weights["model.embed_tokens.weight"][ids.reshape(-1)]
    x = embedded / np.sqrt((embedded**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
    x *= weights["model.layers.0.input_layernorm.weight"]
    np.testing.assert_allclose(found[0]["self_attn.qkv"].result(), x.T @ x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [5, 96, 2500])
def test_sums(size: int) -> None:
    rng = np.random.default_rng(0)
    sums, whole = Sums(size), []
    for tokens in (3, 700, 1500, 1):
        x = rng.standard_normal((tokens, size)).astype(np.float32)
        whole.append(x.copy())
        sums.add(x)
        x[:] = np.nan  # what was added was copied
    x = np.concatenate(whole)
    found = sums.result()
    np.testing.assert_allclose(found, x.T.astype(np.float64) @ x, atol=0.02)
    np.testing.assert_allclose(found, found.T, atol=0.01)


@pytest.mark.parametrize(
    ("out", "options"),
    [("out", {"quant": "q4"}), ("out", {"quant": "q4", "zero_point": True}), ("m.gguf", {"quant": "q4_0"})],
    ids=["q4", "zero points", "Q4_0"],
)
def test_predictions_change_less(tmp_path: Path, out: str, options: dict[str, Any]) -> None:
    source = model(tmp_path)
    reference = LLM(source, device="cpu")
    kl = {}
    for name, more in (("nearest", {"search": True}), ("calibrated", {"calibration": TEXT})):
        export(source, tmp_path / out, force=True, **options, **more)
        export(tmp_path / out, tmp_path / "floats", quant="none", force=True)
        kl[name] = compare(
            reference, LLM(tmp_path / "floats", device="cpu"), TEXT[:2000], context=128
        ).kl_mean
    assert kl["calibrated"] < 0.75 * kl["nearest"]


def test_only_matrices_of_layers_are_calibrated(tmp_path: Path) -> None:
    source = model(tmp_path)
    nearest = export(source, tmp_path / "a", quant="q4", search=True)
    calibrated = export(source, tmp_path / "b", quant="q4", calibration=TEXT)
    for before, after in zip(nearest.tensors, calibrated.tensors, strict=True):
        in_layer = ".layers." in before.name and len(before.shape) == 2
        assert (before.squared_errors != after.squared_errors) == in_layer, before.name


def test_codes_that_are_kept_are_not_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(model(tmp_path), tmp_path / "a.gguf", quant="q8_0")
    monkeypatch.setattr(calibration, "gptq", lambda *a: pytest.fail("rounded again"))
    report = export(tmp_path / "a.gguf", tmp_path / "out", quant="q8", group_size=32, calibration=TEXT)
    assert report.max_error == 0


def test_matrices_that_cannot_be_quantized_stay_as_they_are(tmp_path: Path) -> None:
    config = WIDE | {"intermediate_size": 208}
    source = model(tmp_path, config)
    report = export(source, tmp_path / "out", quant="q4", group_size=128, calibration=TEXT)
    assert "2 of 16 matrices stayed floating-point" in report.notes[0]


def test_windows(tmp_path: Path) -> None:
    source = model(tmp_path)
    tokenizer, config = load_tokenizer(source), ModelConfig.from_hf(WIDE)
    windows = calibration_windows(TEXT, tokenizer, config)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert windows.shape == (len(ids) // 255, 256)
    assert (windows[:, 0] == BOS).all()
    assert windows[0, 1:].tolist() == ids[:255]
    assert windows[-1, 1:].tolist() == ids[-255:]
    assert calibration_windows("x" * 100, tokenizer, config).shape == (1, 101)
    long = calibration_windows(TEXT * 40, tokenizer, config)
    assert long.size == calibration.MAX_TOKENS


def test_bad_input(tmp_path: Path) -> None:
    source = model(tmp_path)
    for options, message in (
        ({"quant": "q4", "calibration": "short"}, "the text to calibrate with has 5 tokens"),
        ({"quant": "none", "calibration": TEXT}, "there is nothing to calibrate with quant none"),
        ({"version": 3, "calibration": TEXT}, "calibrating is possible for safetensors and gguf"),
    ):
        with pytest.raises(UsageError, match=message):
            export(source, tmp_path / "out", **options)
    (source / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="calibrating takes a tokenizer"):
        export(source, tmp_path / "out", quant="q4", calibration=TEXT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_network_that_makes_nan_is_named(tmp_path: Path) -> None:
    weights = random_weights(WIDE)
    weights["model.layers.1.input_layernorm.weight"][3] = np.nan
    source = write_checkpoint(tmp_path / "source", WIDE, weights)
    with pytest.raises(
        CheckpointError, match=r"layer 1 the network makes NaN|layernorm\.weight: a weight is NaN"
    ):
        export(source, tmp_path / "out", quant="q4", calibration=TEXT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_progress(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export(
        model(tmp_path), tmp_path / "out", quant="q4", calibration=TEXT, progress=lambda *a: told.append(a)
    )
    calibrating = [(done, total) for what, done, total in told if what == "calibrating"]
    assert len(calibrating) == 2
    assert calibrating[-1][0] == calibrating[-1][1]


def test_calibrated_gives_tensors_of_the_scheme_in_order(tmp_path: Path) -> None:
    name = "model.layers.{}.self_attn.v_proj.weight"
    with open_checkpoint(model(tmp_path)) as checkpoint:
        windows = calibration_windows(TEXT, load_tokenizer(tmp_path / "source"), checkpoint.config)
        rounded = Calibrated(checkpoint, windows, {name.format(i): q4(32) for i in range(2)})
        assert rounded("model.embed_tokens.weight") is None
        assert rounded(name.format(0).replace("v_proj", "q_proj")) is None
        for i in range(2):
            tensor = rounded(name.format(i))
            assert isinstance(tensor, QuantTensor)
            assert (tensor.scheme, tensor.shape) == (q4(32), (64, 128))
