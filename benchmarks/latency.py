"""How long one user waits: time to first token and time per token, one prompt at a time, through `LLM`.

Models of random weights, of the shapes of some config.json files, are written to disk and loaded like any
other. Prompts are token ids; outputs are chosen, fed back and turned into text as always. The floor of a
token is the bytes of weights that it reads, by the bandwidth measured in the same run.

    python benchmarks/latency.py MODEL ... [--quant none q8 q4] [--device cuda:0] [--json results.json]

A model is a config.json, which gets random weights, or anything that `kuiper` runs, such as a GGUF file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kuiperllm import LLM, Device, SamplingParams
from machine import write_results
from random_model import write_model

PROMPTS = (128, 1024, 8192)
DECODED = 512
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 1},
}


def measure(model: Path, quant: str, group_size: int, device: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = model
        if model.suffix == ".json":
            folder = Path(name) / model.stem
            write_model(model, folder)
        started = time.perf_counter()
        length = PROMPTS[-1] + DECODED + 64
        llm = LLM(
            folder, device=device, quant=quant, group_size=group_size,
            max_model_len=length, prefix_caching=False,
        )  # fmt: skip
        load_s = time.perf_counter() - started
    rng = np.random.default_rng(0)
    prompts = {n: rng.integers(0, llm.config.vocab_size, n).tolist() for n in PROMPTS}
    backend = llm.loaded.decoder.device.backend
    name = model.name if model.is_dir() else model.stem
    kept_as = name if quant == "none" else f"{name}, {quant} g{group_size}"
    result: dict[str, Any] = {"model": kept_as, "load_s": load_s, "first_token_ms": {}, "token_ms": {}}
    for tokens, prompt in prompts.items():
        params = SamplingParams(temperature=0.0, max_tokens=1)
        times = [llm.generate([prompt], params)[0].time_to_first_token_s * 1e3 for _ in range(repeats + 3)]
        result["first_token_ms"][tokens] = median(times[3:])
    for kind, how in SAMPLING.items():
        params = SamplingParams(max_tokens=DECODED, ignore_eos=True, **how)
        llm.generate([prompts[128]], params)
        times = [1e3 / llm.generate([prompts[128]], params)[0].decode_tokens_per_s for _ in range(repeats)]
        result["token_ms"][kind] = {"median": median(times), "all": times}
    bandwidth = backend.read_bandwidth()
    read = llm.loaded.decoder.bytes_per_token
    result["weight_bytes_per_token"] = read
    result["read_bandwidth_bytes_per_s"] = bandwidth
    result["floor_ms"] = 1e3 * read / bandwidth
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--quant", nargs="+", default=["none"], choices=["none", "q8", "q4"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    rows = []
    for model, quant in product(options.models, options.quant):
        row = measure(model, quant, options.group_size, options.device, options.repeats)
        rows.append(row)
        first = ", ".join(f"{tokens}: {ms:.2f}" for tokens, ms in row["first_token_ms"].items())
        token = {kind: times["median"] for kind, times in row["token_ms"].items()}
        share = 100 * row["floor_ms"] / token["greedy"]
        print(
            f"{row['model']:20} loaded in {row['load_s']:.2f} s; ms to the first token of {first}; "
            f"ms per token: greedy {token['greedy']:.4f} ({share:.0f} % of the bandwidth floor), "
            f"sampled {token['sampled']:.4f}",
            flush=True,
        )
    if options.json:
        facts = {"device": options.device, "decoded_tokens": DECODED}
        write_results(options.json, Device(options.device), rows, **facts)


if __name__ == "__main__":
    main()
