"""How much memory loading and running a model takes, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tiny_models import BASE, Weights, random_weights, tensor_shapes, write_checkpoint

SHAPE = BASE | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16_001,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}

ACTIVATION_BYTES = 512 * (2 * 2816 + 2816 + 2 * 1024) * 4 + (4 << 20)
"""Of the 512 tokens that one pass takes in: gate and up, their product, the residual stream and its norm; and
one slab for small tensors."""

MEASURE = """
import gc, json, re, sys
from pathlib import Path
from kuiperllm import LLM, SamplingParams

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
llm = LLM(folder / "small", **options)  # libraries and kernels are loaded before measuring
llm.generate([[97] * 600], params)
del llm
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is measured from here on
before = resident("VmRSS")
llm = LLM(folder / "large", **options)
loaded = resident("VmHWM")
llm.generate([[97] * 600], params)
print(json.dumps({
    "weights": llm.loaded.decoder.weight_bytes,
    "planned": llm.loaded.plan.weight_bytes,
    "cache": llm._engine.runner.cache.nbytes,
    "loading": loaded - before,
    "running": resident("VmHWM") - before,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory")
    small = SHAPE | {"num_hidden_layers": 1, "vocab_size": 261, "hidden_size": 128, "intermediate_size": 256}
    write_checkpoint(path / "small", small, random_weights(small), dtype=ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16) * ml_dtypes.bfloat16(0.03)
    weights: Weights = {name: np.resize(numbers, shape) for name, shape in tensor_shapes(SHAPE).items()}
    write_checkpoint(path / "large", SHAPE, weights, dtype=ml_dtypes.bfloat16)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("options", "bits"), [({}, 16), ({"quant": "q8", "group_size": 64}, 8.25), ({"dtype": "float16"}, 16)]
)
def test_peak_memory(folder: Path, options: dict[str, Any], bits: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    elements = sum(int(np.prod(shape)) for shape in tensor_shapes(SHAPE).values())
    assert found["weights"] == pytest.approx(elements * bits / 8, rel=0.01)
    assert found["weights"] <= 1.01 * found["planned"] <= 1.05 * found["weights"]
    assert found["loading"] <= 1.2 * found["weights"]
    assert found["running"] <= 1.2 * (found["weights"] + found["cache"]) + ACTIVATION_BYTES
