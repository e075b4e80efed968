"""`kuiper info`, `tokenize`, `bench` and `doctor`."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from cli_result import Run
from small_model import CONFIG, tensors, tokenizer_json, write_model

from kuiperllm.backends.cpu.features import host_levels
from kuiperllm.backends.cuda import discovery
from kuiperllm.cli import diagnosis
from kuiperllm.config import ModelConfig, settings
from kuiperllm.core import Device
from kuiperllm.errors import DeviceError

# --- info -------------------------------------------------------------------------------------------------


def test_info_states_what_the_files_hold(kuiper: Run, chat_model: Path) -> None:
    result = kuiper("info", "-m", chat_model, "--json", "--max-model-len", "1000")
    facts = json.loads(result.out)
    arrays = tensors().values()
    assert facts["format"] == "safetensors"
    assert facts["architecture"] == "qwen2"
    assert facts["tensors"] == len(arrays)
    assert facts["parameters"] == sum(array.size for array in arrays)
    assert facts["parameters_by_dtype"] == {"float32": facts["parameters"]}
    assert facts["tensors_by_dtype"] == {"float32": facts["tensors"]}
    assert facts["file_bytes"] == sum(array.nbytes for array in arrays)
    assert ModelConfig.from_hf(facts["config"]) == ModelConfig.from_hf(CONFIG)
    assert facts["tokenizer"]["vocab_size"] == 259
    assert facts["tokenizer"]["chat_template"] is True
    assert facts["memory"]["fits"] is True
    assert facts["memory"]["max_model_len"] == 1000
    # keys and values, 2 layers, 2 heads of 16 channels, float32
    assert facts["memory"]["kv_bytes"] == 1000 * 2 * 2 * 2 * 16 * 4
    assert facts["memory"]["weight_bytes"] == facts["file_bytes"]


def test_info_plans_for_the_quantization_asked_for(kuiper: Run, chat_model: Path) -> None:
    plain, q8 = (
        json.loads(kuiper("info", "-m", chat_model, "--quant", quant, "--json").out)["memory"]
        for quant in ("none", "q8")
    )
    assert 0.25 < q8["weight_bytes"] / plain["weight_bytes"] < 0.3
    assert q8["kv_bytes_per_token"] == plain["kv_bytes_per_token"] / 2


def test_info_for_people_names_the_same(kuiper: Run) -> None:
    result = kuiper("info")
    assert result.code == 0
    for text in (
        "demo",
        "gguf",
        "llama",
        "3.71M",
        "max_position_embeddings = 512",
        "chat template",
        "KV cache",
    ):
        assert text in result.out


def test_check_finds_weights_that_are_no_numbers(kuiper: Run, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    whole = kuiper("info", "-m", folder, "--check")
    assert whole.code == 0
    assert "every weight is a finite number" in whole.out
    path = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    weights["model.norm.weight"][3] = np.nan
    weights["model.layers.1.mlp.up_proj.weight"][5, :2] = np.inf
    safetensors.numpy.save_file(weights, path)
    assert kuiper("info", "-m", folder).code == 0
    damaged = kuiper("info", "-m", folder, "--check")
    assert damaged.code == 1
    assert damaged.err == (
        f"error: {folder}: weights are damaged: model.layers.1.mlp.up_proj.weight: 2 infinite; "
        "model.norm.weight: 1 NaN; get the model again\n"
    )
    found = json.loads(kuiper("info", "-m", folder, "--check", "--json").out)["bad_tensors"]
    assert [tensor["name"] for tensor in found] == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]


def test_info_works_without_a_tokenizer_and_without_enough_memory(kuiper: Run, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    result = kuiper("info", "-m", folder, "--max-model-len", 10**10)
    assert result.code == 0
    assert "none: " in result.out
    assert "needs " in result.out


# --- tokenize ---------------------------------------------------------------------------------------------

TEXTS = ["Hello wörld", "a\n\tb", "<|im_start|>user", "", "  two  ", "日本"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenize_agrees_with_the_library_it_wraps(kuiper: Run, chat_model: Path, text: str) -> None:
    native = tokenizers.Tokenizer.from_str(tokenizer_json())
    for special in (False, True):
        flags = ["--special"] if special else []
        found = json.loads(kuiper("tokenize", "-m", chat_model, *flags, "--json", "--", text).out)
        if special or "<|" not in text:
            assert found["ids"] == native.encode(text).ids
        else:
            assert 257 not in found["ids"]
        assert found["count"] == len(found["ids"]) == len(found["tokens"])
        ids = " ".join(map(str, found["ids"]))
        decoded = kuiper("tokenize", "-m", chat_model, "--special", f"--decode={ids}")
        assert decoded.out == text + "\n"


def test_tokenize_reads_a_tokenizer_alone(kuiper: Run, chat_model: Path) -> None:
    result = kuiper("tokenize", "--tokenizer", chat_model / "tokenizer.json", stdin="Hi\n")
    rows = [line.split(maxsplit=1) for line in result.out.splitlines()]
    assert [text for _, text in rows] == ["'H'", "'i'"]
    assert [int(number) for number, _ in rows] == tokenizers.Tokenizer.from_str(tokenizer_json()).encode(
        "Hi"
    ).ids


@pytest.mark.parametrize("ids", ["1, 2 3", "[1,2,3]", "1 2 3"])
def test_tokenize_decodes_lists_as_programs_print_them(kuiper: Run, ids: str) -> None:
    assert json.loads(kuiper("tokenize", "--decode", ids, "--json").out)["ids"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--decode", "1 x"), 2, "'x' is no token id"),
        (("--decode", "-1"), 2, "'-1' is no token id"),
        (("--decode", "1 99999"), 1, "token id 99999 is outside the vocabulary of 1024"),
        (("--decode", "9" * 30), 2, "is no token id"),
        (("--decode", "1", "text"), 2, "not both"),
    ],
)
def test_tokenize_refuses(kuiper: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = kuiper("tokenize", *arguments)
    assert result.code == code
    assert message in result.refused()


# --- bench ------------------------------------------------------------------------------------------------

QUICK = ("--prompt-tokens", "8", "--gen-tokens", "4", "--repeats", "1", "--threads", "1")


@pytest.mark.parametrize("quant", ["none", "q8"])
def test_bench_of_random_weights_accounts_for_the_bytes(kuiper: Run, tmp_path: Path, quant: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    result = kuiper("bench", "--config", config, "--random-weights", "--quant", quant, *QUICK, "--json")
    found = json.loads(result.out)
    assert found["quant"] == quant
    assert found["threads"] == 1
    assert (found["prompt_tokens"], found["gen_tokens"], found["repeats"]) == (8, 4, 1)
    assert found["versions"]["kuiperllm"] == version("kuiperllm")
    elements = sum(array.size for array in tensors().values())
    size = {"none": 2.0, "q8": 1.0625}[quant]
    assert found["bytes_per_token"] == pytest.approx(elements * size, rel=0.1)
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "read_bandwidth_bytes_per_s"):
        assert np.isfinite(found[name])
        assert found[name] > 0
    assert found["decode_ms_per_token"] == pytest.approx(1e3 / found["decode_tokens_per_s"])
    share = found["decode_bytes_per_s"] / found["read_bandwidth_bytes_per_s"]
    assert found["percent_of_bandwidth"] == pytest.approx(100 * share)


def test_bench_for_people(kuiper: Run) -> None:
    result = kuiper("bench", *QUICK)
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()][:6] == [
        *("model", "machine", "load", "prefill", "decode", "bandwidth")
    ]


@pytest.mark.parametrize("arguments", [("--random-weights",), ("--config", "config.json")])
def test_bench_wants_shape_and_random_weights_together(kuiper: Run, arguments: tuple[str, ...]) -> None:
    result = kuiper("bench", *arguments)
    assert result.code == 2
    assert "go together" in result.refused()


# --- doctor -----------------------------------------------------------------------------------------------


def test_doctor_finds_what_is_there(kuiper: Run) -> None:
    result = kuiper("doctor", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["can_run"] is True
    assert found["kuiperllm"]["value"] == version("kuiperllm")
    assert found["numpy"]["facts"]["version"] == np.__version__
    assert found["kernels"]["facts"]["host_levels"] == list(host_levels())
    assert found["kernel cache"]["facts"]["path"] == str(settings().cache_dir / "cpu")
    assert found["kernel cache"]["facts"]["writable"] is True
    assert found["kernel cache"]["facts"]["entries"] > 0, "the self-test has put one there"
    assert found["memory"]["facts"]["total_bytes"] > found["memory"]["facts"]["free_bytes"] > 0
    assert found["self-test"]["problem"] is None


def test_doctor_names_the_command_that_mends(kuiper: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        diagnosis.metadata, "requires", lambda name: ["numpy>=1.26", "no-such-package>=2.0", "rich>=9999"]
    )
    result = kuiper("doctor")
    assert result.code == 1
    assert f"{sys.executable} -m pip install 'no-such-package>=2.0'" in result.out
    assert f"{sys.executable} -m pip install 'rich>=9999'" in result.out
    assert "cannot run here" in result.out
    assert "'numpy>=1.26'" not in result.out


def test_doctor_survives_what_fails(kuiper: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(diagnosis, "_self_test", broken)
    result = kuiper("doctor", "--json")
    assert result.code == 1
    [finding] = [f for f in json.loads(result.out)["findings"] if f["problem"]]
    assert finding["problem"] == "RuntimeError: two lines"


def gpu_findings(kuiper: Run) -> list[dict[str, Any]]:
    result = kuiper("doctor", "--json")
    assert result.code == 0, "the CPU does without"
    return [f for f in json.loads(result.out)["findings"] if f["name"].startswith("gpu")]


def without_survey(monkeypatch: pytest.MonkeyPatch, has_hardware: bool) -> None:
    def survey() -> None:
        raise DeviceError("the driver is too old: update it")

    monkeypatch.setattr(discovery, "survey", survey)
    monkeypatch.setattr(diagnosis, "_has_nvidia_hardware", lambda: has_hardware)


def test_doctor_without_a_gpu(kuiper: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    without_survey(monkeypatch, has_hardware=False)
    finding = gpu_findings(kuiper)[0]
    assert (finding["value"], finding["problem"], finding["facts"]) == ("none found", None, {"gpus": []})


@pytest.mark.parametrize("installed", [True, False])
def test_doctor_says_why_a_gpu_cannot_be_used(
    kuiper: Run, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    without_survey(monkeypatch, has_hardware=True)
    monkeypatch.setattr(diagnosis, "_has_gpu_packages", lambda: installed)
    finding = gpu_findings(kuiper)[0]
    assert finding["problem"] == "the driver is too old: update it"
    assert finding["fix"] == (None if installed else f"{sys.executable} -m pip install 'kuiperllm[cuda]'")


def test_doctor_names_gpus(kuiper: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [discovery.Gpu("H200", 140 << 30, (9, 0)), discovery.Gpu("T4", 15 << 30, (7, 5))]
    monkeypatch.setattr(discovery, "survey", lambda: ("13.0", gpus))
    monkeypatch.setattr(diagnosis, "_gpu_self_test", lambda: iter(()))
    new, old = gpu_findings(kuiper)[:2]
    assert new["value"] == "cuda:0: H200, 140.00 GiB, compute capability 9.0, driver for CUDA 13.0"
    assert new["problem"] is None
    assert new["facts"]["device"] == "cuda:0"
    assert old["problem"] == "the chip is too old: compute capability 8.0 is needed"


def test_doctor_runs_a_kernel_on_the_gpu(emulated_cuda: Device) -> None:
    [finding] = diagnosis._gpu_self_test()
    assert (finding.value, finding.problem) == ("a kernel ran", None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_doctor_sees_a_cache_that_cannot_be_written(process: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = process("doctor", env=os.environ | {"KUIPER_CACHE_DIR": str(tmp_path / "kernels")})
    assert result.code == 0
    assert "KUIPER_CACHE_DIR" in result.out


@pytest.mark.parametrize("variable", ["KUIPER_CPU_LEVEL", "KUIPER_NUM_THREADS"])
def test_doctor_reports_impossible_settings(process: Run, variable: str) -> None:
    result = process("doctor", env=os.environ | {variable: "nonsense"})
    assert result.code == 1
    assert f"{variable}='nonsense'" in result.out
    assert "Traceback" not in result.out + result.err
