"""`kuiper bench serve`: figures of a load, against a server whose behaviour is known."""

from __future__ import annotations

import asyncio
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from live import Live

from kuiperllm.cli import main
from kuiperllm.errors import KuiperError, UsageError
from kuiperllm.server.load.client import AnswerError, Target
from kuiperllm.server.load.plot import svg
from kuiperllm.server.load.run import LoadConfig, LoadResult, Sample, percentile, run_load, summary


def test_percentiles() -> None:
    assert [percentile([1, 2, 3, 4, 5], part) for part in (0, 50, 75, 100)] == [1, 3, 4, 5]
    assert percentile([1, 2], 50) == 1.5
    assert percentile([7], 99) == 7
    assert summary([]) is None


def test_figures_of_known_requests() -> None:
    samples = [
        Sample(0, first_token_s=0.1, total_s=1.1, tokens=11, token_times_s=[0.1] + [1.1] * 10),
        Sample(0, first_token_s=0.3, total_s=0.3, tokens=1, token_times_s=[0.3]),
        Sample(1, error="status 503"),
    ]
    found = LoadResult("m", LoadConfig(num_requests=3), samples, 2.0, 20).to_dict()
    assert found["answered"] == 2
    assert found["errors"] == {"status 503": 1}
    assert found["output_tokens_per_s"] == 6
    assert found["total_tokens_per_s"] == 16
    assert found["ttft_ms"]["p50"] == pytest.approx(200)
    assert found["tpot_ms"]["mean"] == pytest.approx(100)
    json.dumps(found, allow_nan=False)


def test_a_load(live: Live) -> None:
    config = LoadConfig(num_requests=12, concurrency=4, prompt_tokens=20, gen_tokens=9)
    result = asyncio.run(run_load(Target(live.url), config))
    found = result.to_dict()
    assert (found["answered"], found["output_tokens"], found["prompt_tokens"]) == (12, 108, 240)
    assert found["model"] == "tiny"
    for sample in result.samples:
        assert 0 < sample.first_token_s <= sample.total_s <= result.duration_s
        assert sample.token_times_s == sorted(sample.token_times_s)
    picture = ET.fromstring(svg(result))
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 4


def test_a_rate(live: Live) -> None:
    config = LoadConfig(num_requests=10, rate=50, prompt_tokens=3, gen_tokens=2, spread=0.5)
    result = asyncio.run(run_load(Target(live.url), config))
    begins = sorted(sample.begun_s for sample in result.samples)
    assert 0.05 < begins[-1] < 2  # ten requests at 50 a second
    assert len({sample.tokens for sample in result.samples}) > 1


def test_the_command(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "load.svg"
    command = ["bench", "serve", "--url", f"{live.url}/v1", "--requests", "3", "--gen-tokens", "4"]
    assert main([*command, "--prompt-tokens", "5", "--plot", str(plot), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output_tokens"] == 12
    ET.parse(plot)
    assert main([*command, "--prompt-tokens", "5", "--rate", "100"]) == 0
    assert "output tokens/s" in capsys.readouterr().out


def test_keys(start: Callable[..., Live]) -> None:
    server = start(api_keys=("k",))
    config = LoadConfig(num_requests=1, prompt_tokens=2, gen_tokens=2)
    assert len(asyncio.run(run_load(Target(server.url, "k"), config)).samples) == 1
    with pytest.raises(AnswerError, match="401"):
        asyncio.run(run_load(Target(server.url), config))


def test_what_goes_wrong(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    assert "is a server running there?" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "nowhere"]) == 2
    for option in ("--requests", "--prompt-tokens", "--gen-tokens", "--rate", "--concurrency"):
        assert main(["bench", "serve", "--url", live.url, option, "0"]) == 2
    assert main(["bench", "serve", "--url", live.url, "--spread", "1"]) == 2
    assert capsys.readouterr().err.count("error:") == 7
    with pytest.raises(KuiperError, match="no request was answered"):
        asyncio.run(run_load(Target(live.url), LoadConfig(num_requests=2, prompt_tokens=5000)))
    with pytest.raises(UsageError):
        Target("ftp://x")
