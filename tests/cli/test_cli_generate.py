"""`kuiper generate`: the text is that of the engine, byte for byte, and what is asked for is obeyed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from cli_result import Run

from kuiperllm import LLM, SamplingParams

STORIES = "models/stories260K"


@pytest.fixture(scope="module")
def demo(kernel_cache: Path) -> LLM:
    return LLM()


def greedy(llm: LLM, prompt: str, **more: object) -> str:
    return llm.generate(prompt, SamplingParams(temperature=0, **more))[0].text  # type: ignore[arg-type]


def test_prints_the_continuation_and_one_line_break(kuiper: Run, demo: LLM) -> None:
    result = kuiper("generate", "--temperature", "0", "--max-tokens", "30", "ROMEO:")
    assert result.code == 0
    assert result.out == greedy(demo, "ROMEO:", max_tokens=30) + "\n"
    assert result.said == []


def test_default_is_256_tokens(kuiper: Run, demo: LLM) -> None:
    result = kuiper("generate", "--temperature", "0", "--ignore-eos", "ROMEO:")
    assert result.out == greedy(demo, "ROMEO:", max_tokens=256, ignore_eos=True) + "\n"


def test_echo_puts_the_prompt_in_front(kuiper: Run, demo: LLM) -> None:
    result = kuiper("generate", "--echo", "--temperature", "0", "--max-tokens", "5", "JULIET:")
    assert result.out == "JULIET:" + greedy(demo, "JULIET:", max_tokens=5) + "\n"


@pytest.mark.parametrize("arguments", [["-"], []])
@pytest.mark.parametrize("piped", ["ROMEO:", "ROMEO:\n", "ROMEO:\r\n"])
def test_reads_the_prompt_from_a_pipe(kuiper: Run, demo: LLM, arguments: list[str], piped: str) -> None:
    result = kuiper("generate", "--temperature", "0", "--max-tokens", "5", *arguments, stdin=piped)
    assert result.out == greedy(demo, "ROMEO:", max_tokens=5) + "\n"


def test_only_the_last_line_break_of_a_pipe_is_dropped(kuiper: Run) -> None:
    result = kuiper("generate", "--json", "--max-tokens", "1", stdin=" a\n\n")
    assert json.loads(result.out)["prompt"] == " a\n"


def test_sampling_options_reach_the_engine(kuiper: Run, demo: LLM) -> None:
    options = {
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "seed": 7,
        "max_tokens": 40,
        "min_tokens": 3,
    }
    flags = [x for name, value in options.items() for x in ("--" + name.replace("_", "-"), str(value))]
    result = kuiper("generate", *flags, "ROMEO:")
    assert result.out == demo.generate("ROMEO:", SamplingParams(**options))[0].text + "\n"  # type: ignore[arg-type]


def test_seed_decides(kuiper: Run) -> None:
    texts = {kuiper("generate", "--seed", seed, "--max-tokens", "30", "ROMEO:").out for seed in "1122"}
    assert len(texts) == 2


def test_stop_strings_end_the_text(kuiper: Run, demo: LLM) -> None:
    whole = greedy(demo, "ROMEO:", max_tokens=60)
    middle = whole[len(whole) // 2 :][:4]
    result = kuiper(
        "generate", "--temperature", "0", "--max-tokens", "60", "--stop", "@@", "--stop", middle, "ROMEO:"
    )
    assert result.out == whole[: whole.index(middle)] + "\n"


def test_json_is_one_object_with_everything(kuiper: Run, demo: LLM) -> None:
    arguments = ("--temperature", "0", "--max-tokens", "4", "--logprobs", "3", "--json", "ROMEO:")
    result = kuiper("generate", *arguments)
    found = json.loads(result.out)
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    [expected] = demo.generate("ROMEO:", params)
    assert found["model"] == "demo"
    assert found["prompt"] == "ROMEO:"
    assert found["text"] == expected.text
    assert found["token_ids"] == expected.token_ids
    assert found["prompt_token_ids"] == expected.prompt_token_ids
    assert found["finish_reason"] == "length"
    assert expected.logprobs is not None
    assert len(found["logprobs"]) == 4
    for entry, wanted in zip(found["logprobs"], expected.logprobs, strict=True):
        assert entry["token_id"] == wanted.token_id
        assert entry["logprob"] == pytest.approx(wanted.logprob, abs=1e-6)
        assert [c["token_id"] for c in entry["top"]] == [i for i, _ in wanted.top]
        assert entry["top"][0]["logprob"] == max(c["logprob"] for c in entry["top"])
        assert sum(math.exp(c["logprob"]) for c in entry["top"]) <= 1 + 1e-6
    assert "".join(entry["token"] for entry in found["logprobs"]) == found["text"]


def test_logprobs_are_lines(kuiper: Run) -> None:
    result = kuiper("generate", "--temperature", "0", "--max-tokens", "3", "--logprobs", "2", "ROMEO:")
    lines = result.out.splitlines()
    assert len(lines) == 3
    for line in lines:
        logprob, token = line.split()[:2]
        assert float(logprob) <= 0
        assert line.count(logprob) == 2, "greedy: the token itself leads the candidates"
        assert line.count(token) >= 2


@pytest.mark.parametrize("flag", ["--stats", "-v"])
def test_speed_is_told_on_stderr_when_asked(kuiper: Run, flag: str) -> None:
    result = kuiper("generate", flag, "--seed", "1", "--max-tokens", "5", "ROMEO:")
    assert "3 prompt tokens, 5 new tokens" in result.said[-1]
    assert "tokens/s" not in result.out


def test_quantizing_and_dtype_reach_the_engine(kuiper: Run, chat_model: Path) -> None:
    arguments = ("-m", chat_model, "--temperature", "0", "--max-tokens", "20", "--ignore-eos", "hi")
    q8 = kuiper("generate", "--quant", "q8", "--group-size", "32", *arguments)
    llm = LLM(chat_model, quant="q8", group_size=32)
    assert q8.out == greedy(llm, "hi", max_tokens=20, ignore_eos=True) + "\n"
    assert kuiper("generate", "--dtype", "bfloat16", *arguments).code == 0


@pytest.mark.shared
@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize(
    "files",
    [
        ("stories260K.bin", "tok512.bin"),
        ("stories260K_v1.bin", "tok512.bin"),
        ("stories260Ktok512.gguf",),
        ("stories260K.bin", "tok512.model"),
    ],
    ids="-".join,
)
def test_stories260k_is_the_text_of_llama2c(
    kuiper: Run, shared: Path, files: tuple[str, ...], case: int
) -> None:
    folder = shared / STORIES
    golden = json.loads((folder / "expected.json").read_text())["upstream"][case]
    tokenizer = ("--tokenizer", folder / files[1]) if len(files) == 2 else ()
    result = kuiper(
        *("generate", "-m", folder / files[0], *tokenizer, "--temperature", "0", "--echo"),
        *("--max-tokens", str(golden["steps"]), golden["prompt"]),
    )
    assert result.out == golden["text"] + "\n"
    assert ("the model states only 128 positions" in " ".join(result.said)) == (len(files) == 1)  # the GGUF


@pytest.mark.gpu
@pytest.mark.shared
@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", ["stories260K.bin", "stories260Ktok512.gguf"])
def test_stories260k_on_a_gpu(kuiper: Run, shared: Path, name: str, case: int) -> None:
    folder = shared / STORIES
    golden = json.loads((folder / "expected.json").read_text())["upstream"][case]
    tokenizer = ("--tokenizer", folder / "tok512.bin") if name.endswith(".bin") else ()
    result = kuiper(
        *("generate", "--device", "cuda:0", "-m", folder / name, *tokenizer, "--temperature", "0", "--echo"),
        *("--max-tokens", str(golden["steps"]), golden["prompt"]),
    )
    assert result.out == golden["text"] + "\n"


@pytest.mark.shared
def test_stories260k_gguf_continues_as_in_llama_cpp(kuiper: Run, shared: Path) -> None:
    folder = shared / STORIES
    [golden] = [
        case
        for case in json.loads((folder / "expected.json").read_text())["upstream"]
        if "continuation_starts_with" in case
    ]
    result = kuiper(
        *("generate", "-m", folder / golden["model"], "--temperature", "0", "--max-tokens", "20"),
        golden["prompt"],
    )
    assert result.out.startswith(golden["continuation_starts_with"])
