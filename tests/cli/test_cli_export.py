"""`kuiper export`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from cli_result import Run


def test_floating_point_has_no_table_of_errors(kuiper: Run, chat_model: Path, tmp_path: Path) -> None:
    result = kuiper("export", "-m", chat_model, tmp_path / "out")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()] == ["source", "written", "bits", "time"]
    assert (tmp_path / "out" / "config.json").exists()
    first = kuiper("generate", "-m", chat_model, "--temperature", "0", "--max-tokens", "8", "hello")
    second = kuiper("generate", "-m", tmp_path / "out", "--temperature", "0", "--max-tokens", "8", "hello")
    assert (first.code, first.out) == (second.code, second.out)


def test_table_of_errors(kuiper: Run, chat_model: Path, tmp_path: Path) -> None:
    result = kuiper("export", "-m", chat_model, "--quant", "q4", tmp_path / "m.gguf", "--search")
    assert result.code == 0
    title, head, *rows = result.out.split("\n\n")[0].splitlines()
    assert title == "relative error in percent, largest change of a weight, bits per weight"
    assert head.split() == ["layer", "q", "k", "v", "o", "gate", "up", "down", "max", "bits"]
    assert [row.split()[0] for row in rows] == ["embed_tokens", "0", "1", "all"]
    for row in rows[1:]:
        _, *errors, largest, bits = row.split()
        assert all(5 < float(error) < 9 for error in errors)
        assert 0 < float(largest) < 0.5
        assert 4 < float(bits) < 9
    assert len(rows[1].split()) == len(rows[3].split()) == 10


def test_matrices_that_did_not_change_are_marked(kuiper: Run, chat_model: Path, tmp_path: Path) -> None:
    result = kuiper("export", "-m", chat_model, "--quant", "q8", "--group-size", "64", tmp_path / "out")
    row = result.out.splitlines()[3].split()
    assert (row[0], row[7]) == ("0", "-")  # rows of 96 weights are not made of groups of 64
    assert "note" in result.out
    assert "2 of 15 matrices stayed floating-point" in result.out


def test_json(kuiper: Run, chat_model: Path, tmp_path: Path) -> None:
    result = kuiper(
        "export", "-m", chat_model, "--quant", "q8", "--group-size", "32", "--json", tmp_path / "out"
    )
    report = json.loads(result.out)
    assert (report["format"], report["quant"], report["source_format"]) == (
        "safetensors",
        "q8",
        "safetensors",
    )
    assert report["out_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert report["source_bytes"] > 3 * report["out_bytes"] / 2
    matrix = next(t for t in report["tensors"] if t["name"] == "model.layers.0.mlp.up_proj.weight")
    assert (matrix["shape"], matrix["source"], matrix["stored"]) == ([96, 64], "float32", "q8, groups of 32")
    assert matrix["bits_per_weight"] == 8.5
    assert 0.004 < matrix["relative_error"] < 0.006
    assert 0 < matrix["max_error"] < 0.01


def test_errors_are_one_line(kuiper: Run, chat_model: Path, tmp_path: Path) -> None:
    for code, message, *arguments in (
        (2, "exists already; choose another name, or --force", tmp_path / "taken.gguf"),
        (2, "quant 'q3' is unknown in safetensors", tmp_path / "out", "--quant", "q3"),
        (1, "the format llama2c cannot hold the architecture qwen2", tmp_path / "m.bin"),
        (2, "is the source or a part of it", chat_model),
        (2, "Missing argument 'OUT'"),
    ):
        (tmp_path / "taken.gguf").touch()
        result = kuiper("export", "-m", chat_model, *arguments)
        assert result.code == code
        assert message in result.refused()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.gguf"]
    (tmp_path / "taken.gguf").unlink()
    missing = kuiper("export", "-m", tmp_path / "nothing", tmp_path / "out")
    assert (missing.code, "there is no such file or folder" in missing.refused()) == (1, True)


def test_force(kuiper: Run, chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    assert kuiper("export", "-m", chat_model, tmp_path / "m.gguf", "--force").code == 0
    assert (tmp_path / "m.gguf").stat().st_size > 100_000
