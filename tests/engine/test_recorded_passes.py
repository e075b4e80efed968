"""On the host a pass over a prompt is recorded, then run as a whole, if that does not take long."""

from __future__ import annotations

from pathlib import Path

import pytest

from kuiperllm import LLM, SamplingParams
from kuiperllm.backends.cpu.team import CpuGraph
from kuiperllm.engine import runner


def test_prompts_are_recorded_up_to_a_size(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    replay = CpuGraph.replay

    def counted(graph: CpuGraph) -> None:
        nonlocal count
        count += 1
        replay(graph)

    monkeypatch.setattr(CpuGraph, "replay", counted)
    llm = LLM(random_model, max_num_batched_tokens=24, device="cpu")
    prompt, first = list(range(3, 43)), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    recorded = llm.generate([prompt], first)[0].token_ids
    assert count == 2  # 24 tokens and 16
    monkeypatch.setattr(runner, "RECORDED_WORK", 0)
    assert llm.generate([[*prompt[1:], 7], prompt], first)[1].token_ids == recorded
    assert count == 2
    reports = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    monkeypatch.undo()
    monkeypatch.setattr(CpuGraph, "replay", counted)
    assert llm.generate([prompt], reports)[0].token_ids == recorded
    assert count == 2  # what is reported on the way is not recorded
