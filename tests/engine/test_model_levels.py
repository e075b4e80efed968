"""A whole model at every processor level that this host can run: the same tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kuiperllm.backends.cpu.features import host_levels
from tiny_models import BASE, random_weights, write_checkpoint

GENERATE = """
import sys
from kuiperllm import LLM, Device, SamplingParams

llm = LLM(sys.argv[1], num_threads=1, dtype="float32")
assert Device("cpu").backend.properties["level"] == sys.argv[2]
params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
for done in llm.generate(["Once upon a time, there was a level.", "b"], params):
    print(*done.token_ids)
"""


def test_levels_agree(tmp_path: Path) -> None:
    config = BASE | {"model_type": "qwen2", "hidden_size": 80, "num_key_value_heads": 1, "head_dim": 20}
    write_checkpoint(tmp_path, config, random_weights(config))
    found = {}
    for level in host_levels():
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", GENERATE, tmp_path, level],
            env=os.environ | {"KUIPER_CPU_LEVEL": level},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        found[level] = done.stdout.split()
    assert len(found["generic"]) == 60
    assert all(tokens == found["generic"] for tokens in found.values()), found
