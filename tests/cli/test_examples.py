"""The programs in examples/ run with the demo model and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kuiperllm import LLM, SamplingParams

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str | Path, stdin: str = "") -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_all_examples_are_tested() -> None:
    tested = {"generate.py", "chat.py", "stream_logprobs.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_generate() -> None:
    out = run("generate.py")
    assert out.startswith("ROMEO:")
    assert "First Citizen:" in out
    assert len(re.findall(r"^\[\d+ tokens, ended by (?:stop|length)\]$", out, re.MULTILINE)) == 2


def test_chat_with_the_demo_model() -> None:
    answers = run("chat.py", stdin="Wilt thou be gone?\nIt is not yet near day.\n").splitlines()
    assert len([line for line in answers if line.strip()]) >= 2


def test_chat_with_a_chat_model(chat_model: Path) -> None:
    llm = LLM(chat_model)
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "hello"}]
    expected = llm.chat(messages, SamplingParams(temperature=0.8, seed=1, max_tokens=200)).text
    assert run("chat.py", chat_model, stdin="hello\n") == expected + "\n"


def test_stream_logprobs() -> None:
    prompt = "ROMEO:\n"
    lines = run("stream_logprobs.py", prompt).splitlines()
    [expected] = LLM().generate(prompt, SamplingParams(temperature=0, max_tokens=12, logprobs=3))
    assert len(lines) == len(expected.token_ids)
    for line in lines:
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) == 4
        assert shares[0] == shares[1], "greedy: the chosen token is the most likely one"
        assert shares[1:] == sorted(shares[1:], reverse=True)
        assert sum(shares[1:]) <= 100.2


@pytest.mark.parametrize("name", ["generate.py", "chat.py"])
def test_another_model_can_be_named(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name), str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "there is no such file or folder" in done.stderr
