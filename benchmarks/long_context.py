"""What a long context costs: time per token after more and more tokens, against the bytes that they add.

Models of random weights, of the shapes of some config.json files; one sequence, chosen greedily.

    python benchmarks/long_context.py CONFIG.json ... [--device cuda:0] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kuiperllm.config import EngineConfig, ModelConfig
from kuiperllm.core import Device
from kuiperllm.engine.bench import BenchModel
from machine import write_results

CONTEXTS = (128, 1024, 8192, 32_000)
DECODED = 64


def measure(config: Path, device: str) -> list[dict[str, Any]]:
    shape = ModelConfig.from_hf(json.loads(config.read_text()), where=str(config))
    model = BenchModel(shape, EngineConfig(device=device))
    bandwidth = model.decoder.device.backend.read_bandwidth()
    rows: list[dict[str, Any]] = []
    for context in CONTEXTS:
        model.decode(context, 4)
        ms = min(model.decode(context, DECODED) for _ in range(2)) / DECODED * 1e3
        cached = model.cache.bytes_per_token * (context + DECODED // 2)
        read = model.decoder.bytes_per_token + cached
        rows.append(
            {
                "model": config.stem,
                "context": context,
                "ms_per_token": ms,
                "us_more_than_at_128": 1e3 * (ms - rows[0]["ms_per_token"]) if rows else 0.0,
                "us_of_keys_and_values_at_full_bandwidth": cached / bandwidth * 1e6,
                "percent_of_bandwidth_in_all": 100 * read / bandwidth / ms * 1e3,
            }
        )
        r = rows[-1]
        cost, least = r["us_more_than_at_128"], r["us_of_keys_and_values_at_full_bandwidth"]
        share = r["percent_of_bandwidth_in_all"]
        print(
            f"{r['model']:14} context {context:6}: {ms:.4f} ms a token, {cost:.0f} us more than at 128; "
            f"keys and values alone {least:.0f} us; {share:.0f} % of the bandwidth",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    results = [row for config in options.configs for row in measure(config, options.device)]
    if options.json:
        write_results(options.json, Device(options.device), results)


if __name__ == "__main__":
    main()
