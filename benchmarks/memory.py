"""Peak resident memory of loading and running a model from a safetensors folder, against what it must hold.

    python benchmarks/memory.py [--config benchmarks/configs/llama-3.2-1b.json] [--scratch scratch/memory]

Writes a checkpoint of random bfloat16 weights once, then loads it and generates in a process of its own for
each kind of weights, and reports the process's peak beside packed weights plus key/value cache.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
from datetime import date
from pathlib import Path

from kuiperllm.core import Device
from machine import write_results

HERE = Path(__file__).resolve().parent
GOAL = 1.2

CHILD = """
import json, sys
from kuiperllm.config import EngineConfig
from kuiperllm.engine.bench import BenchModel, peak_memory_bytes
from kuiperllm.engine.loading import open_model

started = peak_memory_bytes()
with open_model(sys.argv[1]) as checkpoint:
    quant = None if sys.argv[2] == "none" else sys.argv[2]
    bench = BenchModel(checkpoint, EngineConfig(device="cpu", quant=quant, num_threads=2))
loaded = peak_memory_bytes()
bench.prefill(512)
bench.decode(512, 16)
print(json.dumps({
    "weights": sys.argv[2], "format": str(bench.decoder.lm_head.weight.format), "load_s": bench.load_s,
    "weight_bytes": bench.decoder.weight_bytes, "kv_cache_bytes": bench.cache.nbytes,
    "before_bytes": started, "peak_loading_bytes": loaded, "peak_bytes": peak_memory_bytes(),
}))
"""


def write_checkpoint(config_file: Path, folder: Path) -> None:
    """A Hugging Face folder with random weights of the shape that the config describes."""
    from kuiperllm.checkpoint.random import RandomCheckpoint
    from kuiperllm.config import ModelConfig
    from kuiperllm.core import Device
    from kuiperllm.models import check_model

    raw = json.loads(config_file.read_text())
    source = RandomCheckpoint(ModelConfig.from_hf(raw))
    check_model(source.config, source, Device("cpu"))  # asks for every tensor that there is
    header: dict[str, object] = {}
    position = 0
    for name, info in source.tensors.items():
        end = position + info.nbytes
        header[name] = {"dtype": "BF16", "shape": info.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in source.tensors:
            array = source.load(name)
            step = max(1, (64 << 20) // max(1, array[:1].nbytes))
            for first in range(0, len(array), step):
                file.write(array[first : first + step].tobytes())
    (folder / "config.json").write_text(json.dumps(raw))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "llama-3.2-1b.json")
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "scratch" / "memory")
    parser.add_argument("--out", type=Path, help="where the results go (default: benchmarks/results/)")
    arguments = parser.parse_args()
    folder = arguments.scratch / arguments.config.stem
    if not (folder / "config.json").exists():
        write_checkpoint(arguments.config, folder)
    rows = []
    for weights in ("q8", "none"):
        command = [sys.executable, "-c", CHILD, str(folder), weights]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        needed = row["weight_bytes"] + row["kv_cache_bytes"]
        row["peak_over_needed"] = row["peak_bytes"] / needed
        rows.append(row)
        mib = {key: row[key] / 2**20 for key in row if key.endswith("_bytes")}
        print(
            f"{row['format']:9s} weights {mib['weight_bytes']:6.0f} MiB  "
            f"KV {mib['kv_cache_bytes']:4.0f} MiB  peak loading {mib['peak_loading_bytes']:6.0f} MiB  "
            f"peak {mib['peak_bytes']:6.0f} MiB  "
            f"= {row['peak_over_needed']:.2f} x (goal {GOAL})  loaded in {row['load_s']:.1f} s"
        )
    out = arguments.out or HERE / "results" / f"{date.today()}-cpu-memory-{arguments.config.stem}.json"
    write_results(out, Device("cpu"), rows, goal=GOAL)


if __name__ == "__main__":
    main()
