"""How fast several sequences decode together: tokens per second by the number of them.

Each has a prompt of its own, of 128 tokens, and 256 tokens to go. The rate is that of decoding, between the
first and the last token of the slowest sequence; the whole call, prompts included, is reported beside it.
Weights are random.

    python benchmarks/batch_decode.py CONFIG.json ... [--device cuda:0] [--batches 1 8 32] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kuiperllm import LLM, Device, SamplingParams
from machine import write_results
from random_model import random_llm


def measure(llm: LLM, batch: int, prompt: int, output: int, temperature: float) -> dict[str, float]:
    """One batch, from the first token of the last sequence to begin until all are done."""
    ids = np.random.default_rng(batch).integers(0, llm.config.vocab_size, (batch, prompt))
    params = SamplingParams(temperature=temperature, max_tokens=output, ignore_eos=True)
    runner, before = llm._engine.runner, llm._engine.stats().steps
    waited, started = runner.device_s, time.perf_counter()
    done = llm.generate(ids.tolist(), params)
    seconds = time.perf_counter() - started
    first = max(each.time_to_first_token_s for each in done)
    steps = llm._engine.stats().steps - before
    return {
        "tokens_per_s": batch * (output - 1) / (seconds - first),
        "whole_tokens_per_s": batch * output / seconds,
        "step_ms": 1e3 * (seconds - first) / (output - 1),
        "host_ms_per_step": 1e3 * (seconds - runner.device_s + waited) / steps,
        "first_token_ms": 1e3 * first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quant")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    rows = []
    most, length = max(options.batches), options.prompt + options.output
    for config in options.configs:
        llm = random_llm(
            config,
            device=options.device,
            quant=options.quant,
            max_model_len=length,
            max_num_seqs=most,
            kv_cache_tokens=most * -(-length // 32) * 32,
            prefix_caching=False,
        )
        shape = options.prompt, options.output, options.temperature
        by_batch: dict[int, dict[str, Any]] = {}
        for batch in options.batches:
            measure(llm, batch, *shape)
            runs = [measure(llm, batch, *shape) for _ in range(options.repeats)]
            by_batch[batch] = {name: median(run[name] for run in runs) for name in runs[0]}
            found = by_batch[batch]
            print(
                f"{config.stem:14} {batch:4} at once: {found['tokens_per_s']:9,.1f} tokens/s, "
                f"{found['whole_tokens_per_s']:,.1f} with prompts; steps of {found['step_ms']:.3f} ms, of "
                f"which the host is busy for {found['host_ms_per_step']:.3f}",
                flush=True,
            )
        rows.append({"model": config.stem, "batches": by_batch})
        del llm
    if options.json:
        facts = {"device": options.device, "quant": options.quant or "none", "prompt": options.prompt}
        facts |= {"output": options.output, "temperature": options.temperature}
        write_results(options.json, Device(options.device), rows, **facts)


if __name__ == "__main__":
    main()
