"""The comparison harness: the random GGUF files, the worker protocol, the arithmetic of its tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
ENGINE = """
from worker_protocol import serve

class Engine:
    def info(self):
        print("a library that talks")
        return {"name": "test"}
    def prefill(self, *, tokens):
        return tokens / 2
    def decode(self, *, prompt, tokens):
        raise ValueError("no cache")
    def unload(self):
        raise SystemExit(3)

serve(Engine())
"""


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(("kind", "tolerance"), [("Q8_0", 0.08), ("BF16", 0.02), ("F16", 0.02)])
def test_random_gguf_holds_the_weights_that_decode_reads(kind: str, tolerance: float, tmp_path: Path) -> None:
    import gguf

    from compare_llama_cpp import gguf_bytes_per_token
    from random_gguf import write_random_gguf

    write_random_gguf(CONFIG, kind, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    matrices = [t for t in tensors.values() if t.tensor_type == gguf.GGMLQuantizationType[kind]]
    assert len(tensors) == 2 + 2 * 12
    assert len(matrices) == 1 + 2 * 7
    assert sum(t.n_bytes for t in matrices) == gguf_bytes_per_token(CONFIG, 34 / 32 if kind == "Q8_0" else 2)
    embedding = gguf.dequantize(tensors["token_embd.weight"].data, gguf.GGMLQuantizationType[kind])
    assert embedding.shape == (96, 64)
    std = 0.02 * (1.0408 if kind == "Q8_0" else 1)  # scales uniform in 0.5..1.5: sqrt(1 + 1/12)
    assert embedding.std() == pytest.approx(std, rel=tolerance)
    assert abs(embedding.mean()) < 1e-3
    assert np.array_equal(tensors["blk.1.attn_norm.weight"].data, np.ones(64, np.float32))


def test_random_gguf_refuses_a_model_it_does_not_know(tmp_path: Path) -> None:
    from random_gguf import write_random_gguf

    with pytest.raises(SystemExit, match="'gemma' is not supported"):
        write_random_gguf(CONFIG | {"model_type": "gemma"}, "F16", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_worker_answers_fails_and_ends_with_one_line(tmp_path: Path) -> None:
    from workers import Worker

    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    log = tmp_path / "log"
    with Worker(
        "test", [sys.executable, script], log, {"PYTHONPATH": str(BENCHMARKS)}, timeout_s=60
    ) as worker:
        assert worker.ask("info") == {"name": "test"}
        assert worker.ask("prefill", tokens=5) == 2.5
        with pytest.raises(SystemExit, match=r"test failed in 'decode': ValueError: no cache; see .*log"):
            worker.ask("decode", prompt=1, tokens=1)
        with pytest.raises(SystemExit, match="no command 'quit'"):
            worker.ask("quit")
        with pytest.raises(SystemExit, match="ended during 'unload' with exit code 3"):
            worker.ask("unload")
    assert "a library that talks" in log.read_text()


def test_summary_takes_ratios_within_rounds() -> None:
    from compare_llama_cpp import summarize

    def taken(theirs: tuple[float, float], ours: tuple[float, float]) -> dict[str, object]:
        return {
            "llama.cpp": {"prefill_s": theirs[0], "decode_s": theirs[1]},
            "KuiperLLM": {"prefill_s": ours[0], "decode_s": ours[1]},
            "read_bandwidth": 1000.0,
            "other_load": 0.0,
        }

    rounds = [taken((1.0, 1.0), (0.5, 1.0)), taken((2.0, 2.0), (0.5, 1.0)), taken((4.0, 4.0), (0.5, 4.0))]
    args = argparse.Namespace(prefill=100, tokens=8)
    summary = summarize(rounds, {"llama.cpp": 100, "KuiperLLM": 50}, args)
    assert summary["tokens_per_s"]["llama.cpp"]["prefill"] == {"median": 50, "min": 25, "max": 100}
    assert summary["tokens_per_s"]["KuiperLLM"]["decode"] == {"median": 8, "min": 2, "max": 8}
    assert summary["ratio"]["prefill"] == {"median": 4, "min": 2, "max": 8}
    assert summary["ratio"]["decode"] == {"median": 1, "min": 1, "max": 2}
    assert summary["decode_share_of_bandwidth"]["llama.cpp"]["max"] == pytest.approx(0.8)
    assert summary["decode_share_of_bandwidth"]["KuiperLLM"]["max"] == pytest.approx(0.4)


def test_rounds_disturbed_by_other_programs_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    import compare_llama_cpp as compare

    loads = iter([9.0, 0.5, 0.0, 0.5, 0.1])  # the first belongs to the warm-up
    monkeypatch.setattr(compare, "run_round", lambda *_: {})
    monkeypatch.setattr(
        compare, "OtherLoad", lambda pids: argparse.Namespace(restart=lambda: next(loads, 0.5))
    )
    bandwidth = argparse.Namespace(process=argparse.Namespace(pid=1))
    args = argparse.Namespace(rounds=2, max_other_load=0.1)
    rounds, quiet = compare.measure({}, bandwidth, args)
    assert [r["quiet"] for r in rounds] == [False, True, False, True]
    assert quiet
    rounds, quiet = compare.measure({}, bandwidth, args)
    assert len(rounds) == 6
    assert not quiet
