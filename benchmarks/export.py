"""Wall time and peak resident memory of exporting a checkpoint of random bfloat16 weights.

    python benchmarks/export.py [--config benchmarks/configs/llama-3.1-8b.json] [--kinds safetensors:q4 ...]

The source takes no disk: its weights are made as they are read. The output goes to `--scratch` and is
removed; bringing it to the disk counts. Each kind runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from time import perf_counter

from kuiperllm.core import Device
from machine import OtherLoad, write_results

HERE = Path(__file__).resolve().parent
GOAL_BYTES = 4 << 30
KINDS = ("safetensors:q4", "safetensors:q8", "gguf:q4_k_m", "safetensors:q4:search", "safetensors:none")

CHILD = """
import json, sys
from pathlib import Path
from kuiperllm.checkpoint.random import RandomCheckpoint
from kuiperllm.config import ModelConfig
from kuiperllm.engine.bench import peak_memory_bytes
from kuiperllm.engine.export.exporting import export_checkpoint
from kuiperllm.engine.export.options import ExportOptions

config, out, kind, threads = sys.argv[1:]
format, quant, *search = kind.split(":")
source = RandomCheckpoint(ModelConfig.from_hf(json.loads(Path(config).read_text())))
before = peak_memory_bytes()
options = ExportOptions(format, quant, search=bool(search))
report = export_checkpoint(source, Path(out), options, name="random", threads=int(threads))
print(json.dumps({
    "kind": kind, "seconds": report.seconds, "peak_bytes": peak_memory_bytes(), "before_bytes": before,
    "source_bytes": report.source_bytes, "out_bytes": report.out_bytes,
    "bits_per_weight": report.bits_per_weight, "relative_error": report.relative_error,
}))
"""


def disk_bytes_per_s(folder: Path) -> float:
    """How fast the disk takes a gigabyte of zeros, brought to the disk."""
    started, block = perf_counter(), bytes(8 << 20)
    path = folder / "zeros"
    try:
        with path.open("wb") as file:
            for _ in range(128):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return (1 << 30) / (perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "llama-3.1-8b.json")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="FORMAT:QUANT or FORMAT:QUANT:search")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "scratch" / "export")
    parser.add_argument("--out", type=Path, help="where the results go (default: benchmarks/results/)")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    results = []
    for kind in arguments.kinds:
        out = arguments.scratch / "out"
        load = OtherLoad([])
        try:
            command = [sys.executable, "-c", CHILD, arguments.config, out, kind, str(arguments.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        finally:
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
        result = json.loads(done.stdout) | {"other_load": load.restart()}
        results.append(result)
        within = "within" if result["peak_bytes"] < GOAL_BYTES else "BEYOND"
        print(
            f"{kind:22} {result['seconds']:7.1f} s, {result['out_bytes'] / 1e9:6.2f} GB written, "
            f"peak {result['peak_bytes'] / 1e6:.0f} MB ({within} 4 GiB)"
        )
    facts = {
        "config": arguments.config.stem,
        "threads": arguments.threads,
        "disk_bytes_per_s": disk_bytes_per_s(arguments.scratch),
    }
    name = f"{date.today()}-cpu-export-{arguments.config.stem}.json"
    path = arguments.out or HERE / "results" / name
    write_results(path, Device("cpu"), results, **facts)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
