"""The table of accuracies: how it is made, and that the page shows what was measured."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from kuiperllm import LLM, compare

ROOT = Path(__file__).resolve().parents[1]
TEXT = "ROMEO:\nBut soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n"


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("accuracy")


def test_rows_are_what_compare_measures(
    accuracy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ROOT / "src" / "kuiperllm" / "data" / "demo.gguf"
    text, page, out = (tmp_path / name for name in ("text", "page", "out"))
    text.write_text(f"{TEXT}<|endoftext|>{TEXT[:50]}")
    page.write_text("before\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nafter\n")
    more = ["--file", f"x={demo}", "--file", "y=elsewhere.gguf", "--only", "q8 32,demo"]
    where = ["--scratch", str(tmp_path), "--out", str(out), "--page", str(page)]
    accuracy.main([f"x={demo}={text}", *more, *where])

    rows = json.loads(out.read_text())["results"]
    assert [(row["model"], row["weights"]) for row in rows] == [
        ("x", "float32"),
        ("x", "q8 32"),
        ("x", "demo"),
    ]
    reference = LLM(tmp_path / "x-F32.gguf", device="cpu")
    texts = [TEXT.strip(), TEXT[:50].strip()]
    expected = compare(reference, LLM(demo, device="cpu"), texts)
    assert rows[0]["perplexity"]["mean_nll"] == pytest.approx(expected.reference.mean_nll, abs=1e-5)
    assert rows[2]["kl_mean"] == expected.kl_mean
    assert rows[2]["perplexity"]["mean_nll"] == expected.other.mean_nll
    assert rows[0]["weight_bytes"] > 3.5 * rows[1]["weight_bytes"]
    table = accuracy.table(rows)
    assert page.read_text() == f"before\n<!-- accuracy:begin -->\n{table}\n<!-- accuracy:end -->\nafter\n"
    assert table in capsys.readouterr().out
    assert {line.count("|") for line in table.splitlines()} == {len(accuracy.COLUMNS) + 1}
    assert f"{rows[2]['perplexity']['perplexity']:.4f}" in table


def test_files_of_other_types_hold_the_same_weights(accuracy: ModuleType, tmp_path: Path) -> None:
    demo = ROOT / "src" / "kuiperllm" / "data" / "demo.gguf"
    whole = accuracy.rewrite(demo, "F32", tmp_path / "whole.gguf")
    again = accuracy.rewrite(whole, "Q8_0", tmp_path / "again.gguf")
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (demo, again))
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # what was rounded once is not changed by rounding
        assert tensor.tensor_type == after[name].tensor_type
        values = (gguf.dequantize(t.data, t.tensor_type) for t in (tensor, after[name]))
        np.testing.assert_allclose(*values, rtol=0, atol=1e-6)
    assert LLM(again).token_ids(TEXT) == LLM(demo).token_ids(TEXT)


def test_types_that_can_be_made(accuracy: ModuleType) -> None:
    found = accuracy.writable_types()
    assert found[0] == "Q8_0"
    assert not {"F32", "F16", "BF16"} & set(found)


def test_page_shows_the_newest_results(accuracy: ModuleType) -> None:
    newest = max((ROOT / "benchmarks" / "results").glob("*-cpu-accuracy.json"))
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    written = accuracy.MARKED.search(page)
    assert written is not None
    assert accuracy.table(json.loads(newest.read_text())["results"]) in written[0]
