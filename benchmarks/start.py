"""Times a whole process: from its start to its first token, with a warm and with an empty kernel cache.

A checkpoint of random weights, of the shape of a config.json, is written to disk first, with a tokenizer. It
is read once, so that it comes from memory as it does for a model that was used before; `--cold-file` leaves
that out.

    python benchmarks/start.py benchmarks/configs/llama-3.2-1b.json [--device cuda:0] [--json results.json]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from kuiperllm.core import Device
from machine import write_results
from random_model import write_model

_RUN = "import sys; from kuiperllm.cli import main; sys.exit(main())"


def seconds_to_first_token(folder: Path, device: str, cache: Path) -> float:
    """From the start of a process to the end of one that generates a single token."""
    command = [
        *(sys.executable, "-c", _RUN, "generate", "-m", str(folder), "--device", device),
        *("--max-tokens", "1", "--temperature", "0", "Hello"),
    ]
    environment = os.environ | {"KUIPER_CACHE_DIR": str(cache)}
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def read_once(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 26):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold-file", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "model", Path(name) / "cache"
        write_model(options.config, folder)
        if not options.cold_file:
            read_once(folder)
        empty = []
        for _ in range(2):
            shutil.rmtree(cache, ignore_errors=True)
            empty.append(seconds_to_first_token(folder, options.device, cache))
        warm = [seconds_to_first_token(folder, options.device, cache) for _ in range(options.repeats)]
        size = sum(path.stat().st_size for path in folder.iterdir())
    device = Device(options.device)
    print(f"{options.config.stem} on {device.backend.properties['name']}: {size / 1e9:.2f} GB of safetensors")
    print(f"  empty kernel cache {median(empty):.2f} s, warm {median(warm):.2f} s")
    if options.json:
        result = {"config": options.config.stem, "checkpoint_bytes": size}
        result |= {"empty_cache_s": empty, "warm_s": warm}
        write_results(options.json, device, [result], device=options.device)


if __name__ == "__main__":
    main()
