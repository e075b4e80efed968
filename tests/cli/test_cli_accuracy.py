"""`kuiper perplexity` and `kuiper compare`: what they print, and what they refuse."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_result import Run
from small_model import write_model

from kuiperllm import LLM, compare

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(150))
CUT = ("--context", "32", "--device", "cpu")


@dataclass(frozen=True)
class Files:
    folder: Path

    def __call__(self, name: str, data: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path


@pytest.fixture
def write(tmp_path: Path) -> Files:
    return Files(tmp_path)


# --- perplexity ---------------------------------------------------------------------------------------------


def test_perplexity_is_what_the_engine_measures(kuiper: Run, chat_model: Path, write: Files) -> None:
    path = write("text.txt", TEXT + "\n")
    result = kuiper("perplexity", "-m", chat_model, path, *CUT, "--json")
    assert (result.code, result.said) == (0, [])
    found = json.loads(result.out)
    expected = LLM(chat_model, device="cpu").perplexity(TEXT, context=32).to_dict()
    del expected["seconds"], expected["tokens_per_s"]
    assert {name: found[name] for name in expected} == expected
    assert found["num_windows"] == 4
    assert (found["model"], found["file"]) == (str(chat_model), str(path))
    assert (found["quant"], found["weights"], found["device"]) == ("none", "float32", "cpu")
    assert found["tokens_per_s"] > 0
    table = kuiper("perplexity", "-m", chat_model, path, *CUT).out
    assert f"{found['perplexity']:.4f} ± {found['standard_error']:.4f}" in table
    assert "4 windows of 32 tokens, the last 15 of each scored" in table


def test_options_reach_the_engine(kuiper: Run, chat_model: Path, write: Files) -> None:
    path = write("text.txt", TEXT)

    def run(*options: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(
            kuiper("perplexity", "-m", chat_model, path, "--json", *options).out
        )
        return found

    assert run("--context", "32", "--chunks", "2")["num_windows"] == 2
    strided = run("--context", "32", "--stride", "16")
    assert (strided["stride"], strided["num_windows"]) == (16, 7)
    assert str(run(*CUT, "--quant", "q8")["weights"]).startswith("q8")
    assert run(*CUT, "--dtype", "bfloat16")["weights"] == "bfloat16"


def test_texts_with_a_separator_are_scored_whole(kuiper: Run, chat_model: Path, write: Files) -> None:
    path = write("text.txt", f"one text<sep>\n\n another \n<sep>{TEXT}<sep>\n")
    found = json.loads(kuiper("perplexity", "-m", chat_model, path, "--separator", "<sep>", "--json").out)
    expected = LLM(chat_model).perplexity(["one text", "another", TEXT])
    assert found["num_windows"] == 3
    assert found["context"] is None
    assert found["mean_nll"] == pytest.approx(expected.mean_nll)


def test_a_text_can_be_piped_in(kuiper: Run, chat_model: Path, write: Files) -> None:
    path = write("text.txt", TEXT + "\n")
    said = [
        json.loads(kuiper("perplexity", "-m", chat_model, name, *CUT, "--json", stdin=TEXT + "\n").out)
        for name in (path, "-")
    ]
    assert said[0]["mean_nll"] == said[1]["mean_nll"]


def test_v_tells_of_progress(kuiper: Run, chat_model: Path, write: Files) -> None:
    result = kuiper("perplexity", "-m", chat_model, write("text.txt", TEXT), *CUT, "-v")
    assert "scoring: 128 of 128 tokens" in result.err
    assert "tokens/s, perplexity" in result.err
    assert logging.getLogger("kuiperllm").handlers == []


# --- compare ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, normalized with another epsilon."""
    return write_model(tmp_path_factory.mktemp("models") / "other", rms_norm_eps=0.5)


def test_compare_is_what_the_engine_measures(
    kuiper: Run, chat_model: Path, other_model: Path, write: Files
) -> None:
    path = write("text.txt", TEXT)
    result = kuiper("compare", "-m", chat_model, other_model, path, *CUT, "--json")
    assert (result.code, result.said) == (0, [])
    found = json.loads(result.out)
    llms = [LLM(model, device="cpu") for model in (chat_model, other_model)]
    expected = compare(llms[0], llms[1], TEXT, context=32).to_dict()
    reference, other = expected.pop("reference"), expected.pop("other")
    assert {name: found[name] for name in expected} == expected
    assert found["reference"]["mean_nll"] == reference["mean_nll"]
    assert found["other"]["mean_nll"] == other["mean_nll"] != reference["mean_nll"]
    assert [found[which]["model"] for which in ("reference", "other")] == [str(chat_model), str(other_model)]
    assert found["kl_mean"] > 0.001
    table = kuiper("compare", "-m", chat_model, other_model, path, *CUT).out
    assert f"mean {found['kl_mean']:.6f} ±" in table
    assert f"ratio {found['perplexity_ratio']:.6g} ± " in table


def test_a_model_compared_with_itself_quantized(kuiper: Run, chat_model: Path, write: Files) -> None:
    path = write("text.txt", TEXT)
    options = ("--other-quant", "q8", "--other-group-size", "32")
    found = json.loads(kuiper("compare", "-m", chat_model, path, *CUT, *options, "--json").out)
    assert [found[which]["weights"][:2] for which in ("reference", "other")] == ["fl", "q8"]
    assert found["reference"]["weight_bytes"] > 3 * found["other"]["weight_bytes"]
    assert 0 < found["kl_mean"] < 0.1
    llms = [LLM(chat_model, device="cpu"), LLM(chat_model, device="cpu", quant="q8", group_size=32)]
    assert found["kl_mean"] == compare(llms[0], llms[1], TEXT, context=32).kl_mean


def test_options_are_for_both_models_and_other_ones_for_one(
    kuiper: Run, chat_model: Path, other_model: Path, write: Files
) -> None:
    def formats(*options: str) -> list[str]:
        path = write("text.txt", TEXT)
        found = json.loads(
            kuiper("compare", "-m", chat_model, other_model, path, *CUT, *options, "--json").out
        )
        return [found[which]["weights"].split(",")[0] for which in ("reference", "other")]

    assert formats("--quant", "q8") == ["q8", "q8"]
    assert formats("--quant", "q8", "--other-quant", "none") == ["q8", "float32"]
    assert formats("--other-dtype", "bfloat16") == ["float32", "bfloat16"]


# --- what is refused ----------------------------------------------------------------------------------------

Make = Callable[[Files], tuple[str | Path, ...]]

BAD: dict[str, tuple[Make, int, str]] = {
    "no file": (lambda _: (), 2, "FILE"),
    "file missing": (lambda _: ("nowhere.txt",), 2, "nowhere.txt: No such file or directory"),
    "folder": (lambda write: (write.folder,), 2, "Is a directory"),
    "null character": (lambda _: ("a\0b",), 2, "name a text file"),
    "empty": (lambda write: (write("t", ""),), 2, "t is empty"),
    "blank": (lambda write: (write("t", " \n\n"),), 2, "t is empty"),
    "not UTF-8": (lambda write: (write("t", b"abc\xff\xfe" * 99),), 2, "t is not UTF-8 text: .* at byte 3"),
    "too short": (lambda write: (write("t", "abc"),), 2, "needs? 1024 or more; use a longer text$"),
    "a bit short": (lambda write: (write("t", "a" * 999),), 2, "1024 or more; .* a context of at most 499"),
    "context of 3": (lambda write: (write("t", TEXT), "--context", "3"), 2, "--context must be at least 4"),
    "stride of 0": (lambda write: (write("t", TEXT), "--stride", "0"), 2, "--stride must be at least 1"),
    "no chunks": (lambda write: (write("t", TEXT), "--chunks", "0"), 2, "--chunks must be at least 1"),
    "long stride": (lambda write: (write("t", TEXT), *CUT, "--stride", "33"), 2, "stride 33 is not possible"),
    "long context": (
        lambda write: (write("t", TEXT), "--context", "65", "--max-model-len", "64"),
        2,
        "window of 65 tokens does not fit into the context of 64",
    ),
    "empty separator": (lambda write: (write("t", TEXT), "--separator", ""), 2, "--separator must not be"),
    "separator and context": (
        lambda write: (write("t", TEXT), *CUT, "--separator", "x"),
        2,
        "--context and --stride do not go with it",
    ),
    "long text of several": (
        lambda write: (write("t", TEXT + "|b"), "--separator", "|", "--max-model-len", "64"),
        2,
        "window of 150 tokens does not fit",
    ),
    "unknown quant": (lambda write: (write("t", TEXT), "--quant", "q9"), 2, "quant 'q9' is unknown"),
    "no such model": (lambda write: ("-m", "./nowhere", write("t", TEXT)), 1, "nowhere"),
}


@pytest.mark.parametrize("command", ["perplexity", "compare"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    kuiper: Run, chat_model: Path, other_model: Path, write: Files, command: str, name: str
) -> None:
    make, code, message = BAD[name]
    arguments = make(write)
    if "-m" not in arguments:
        arguments = ("-m", chat_model, *arguments)
    if command == "compare":
        arguments = (*arguments, "--other-quant", "q8")
    result = kuiper(command, *arguments)
    assert result.code == code
    assert re.search(message, result.refused()), result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "text", "more"), "one too many: 'more'"),
        (("text",), "nothing to compare with: name OTHER before FILE"),
        (("text", "--other-quant", "none"), "nothing to compare with"),
        (("text", "--other-quant", "q9"), "quant 'q9' is unknown"),
        (("text", "--other-group-size", "33"), "group_size 33 is not possible"),
    ],
)
def test_what_compare_alone_refuses(
    kuiper: Run, chat_model: Path, write: Files, arguments: tuple[str, ...], message: str
) -> None:
    path = write("text", TEXT)
    result = kuiper("compare", "-m", chat_model, *(path if word == "text" else word for word in arguments))
    assert result.code == 2
    assert message in result.refused()


def test_models_of_different_vocabularies_are_refused(kuiper: Run, chat_model: Path, write: Files) -> None:
    result = kuiper("compare", "-m", chat_model, "demo", write("text", TEXT), *CUT)
    assert result.code == 2
    assert "vocabulary of 272 and demo one of 1024; only models of the same vocabulary" in result.refused()


def test_a_model_without_a_tokenizer_is_refused(kuiper: Run, tmp_path: Path, write: Files) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    result = kuiper("perplexity", "-m", folder, write("text", TEXT), *CUT)
    assert result.code == 1
    assert "tokenizer" in result.refused()


def test_endless_input_is_refused(kuiper: Run, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kuiperllm.cli.text_input._MOST_FILE_BYTES", 3 << 20)
    result = kuiper("perplexity", "-m", chat_model, "/dev/zero")
    assert result.code == 2
    assert "/dev/zero has more than 3 MiB" in result.refused()
