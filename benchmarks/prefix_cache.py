"""What the prefix cache saves: time to first token of a prompt, the first time and when it comes again.

python benchmarks/prefix_cache.py CONFIG.json ... [--device cuda:0] [--prompt 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import numpy as np

from kuiperllm import LLM, Device, SamplingParams
from machine import write_results
from random_model import random_llm

ONE = SamplingParams(temperature=0.0, max_tokens=1)


def measure(llm: LLM, tokens: int, repeats: int) -> tuple[float, float]:
    """Milliseconds to the first token of prompts that are new, and of the same ones again."""
    rng = np.random.default_rng(0)
    new, again = [], []
    for repeat in range(repeats + 1):
        prompt = rng.integers(0, llm.config.vocab_size, tokens).tolist()
        for times in (new, again):
            done = llm.generate([prompt], ONE)[0]
            if repeat:  # the first one compiles kernels
                times.append(1e3 * done.time_to_first_token_s)
    return median(new), median(again)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quant")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    rows = []
    for config in options.configs:
        length = options.prompt + 32
        llm = random_llm(
            config,
            device=options.device,
            quant=options.quant,
            max_model_len=length,
            kv_cache_tokens=8 * length,
        )
        new, again = measure(llm, options.prompt, options.repeats)
        print(
            f"{config.stem:14} first token of {options.prompt} tokens: {new:.1f} ms, again {again:.1f} ms "
            f"({100 * again / new:.1f} %)"
        )
        rows.append({"model": config.stem, "prompt": options.prompt, "first_ms": new, "again_ms": again})
    if options.json:
        facts = {"device": options.device, "quant": options.quant or "none"}
        write_results(options.json, Device(options.device), rows, **facts)


if __name__ == "__main__":
    main()
