"""Quantized safetensors of other programs as sources of an export."""

from __future__ import annotations

import json

import numpy as np
import pytest
from quantized_writers import (
    E4M3,
    UP,
    WIDE,
    awq,
    gptq,
    random_e4m3,
    read_awq,
    read_gptq,
    shape_of,
    write_quantized,
)

from kuiperllm import UnsupportedError, export
from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.quant import QuantTensor

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
NAME = f"{UP}.weight"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def exported(tmp_path, name=NAME, **options):
    report = export(tmp_path / "source", tmp_path / "out", **options)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        weight = checkpoint.load(name)
        raw = json.loads((tmp_path / "out" / "config.json").read_text())
    return report, weight, raw


def test_awq_becomes_ours_with_the_same_codes(tmp_path, rng):
    parts = awq(rng, shape_of(UP), 32)
    write_quantized(tmp_path / "source", {UP: parts}, AWQ, WIDE)
    report, weight, raw = exported(tmp_path)
    assert isinstance(weight, QuantTensor)
    assert (weight.dequantize() == read_awq(parts, 32).astype(np.float32)).all()
    assert raw["quantization_config"] == {
        "quant_method": "kuiper",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
    }
    assert report.max_error == 0
    report, again, raw = exported(tmp_path, quant="none", dtype="float32", force=True)
    assert (again == weight.dequantize()).all()
    assert "quantization_config" not in raw


def test_codes_of_gptq_in_another_order_are_kept_by_nobody(tmp_path, rng):
    parts = gptq(rng, shape_of(UP), 32, act_order=True)
    write_quantized(tmp_path / "source", {UP: parts}, GPTQ, WIDE)
    with pytest.raises(
        UnsupportedError, match=r"up_proj\.weight: its codes cannot be kept .* in another order"
    ):
        exported(tmp_path)
    assert not (tmp_path / "out").exists()
    _, weight, _ = exported(tmp_path, quant="none", dtype="float32")
    expected = read_gptq(parts).astype(np.float32)
    assert (weight == expected).all()
    report, weight, _ = exported(tmp_path, quant="q8", group_size=32, force=True)
    assert np.abs(weight.dequantize() - expected).max() <= np.abs(expected).max() / 127
    (up,) = (tensor for tensor in report.tensors if tensor.name == NAME)
    assert 0 < up.relative_error < 0.01


def test_fp8_is_rounded_only_when_asked(tmp_path, rng):
    codes, scale = random_e4m3(rng, shape_of(UP)), np.array(0.25, np.float32)
    write_quantized(tmp_path / "source", {UP: {"weight": codes, "weight_scale": scale}}, FP8, WIDE)
    expected = codes.view(E4M3).astype(np.float32) * np.float32(0.25)
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight is fp8-e4m3, which safetensors cannot hold"):
        exported(tmp_path)
    _, weight, raw = exported(tmp_path, quant="none", dtype="bfloat16")
    assert (weight.astype(np.float32) == expected).all()  # e4m3 has fewer digits than bfloat16
    assert "quantization_config" not in raw
