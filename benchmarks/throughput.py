"""Tokens per second of many requests at once, offline, through `LLM.generate`.

256 requests whose prompts and outputs have 100 to 1,024 tokens each, evenly distributed (142,827 tokens in,
133,966 out), at temperature 0.6, none of which stops early. Kernels are compiled and decode steps captured
before the clock starts. Weights are random.

    python benchmarks/throughput.py CONFIG.json ... [--device cuda:0] [--json results.json]
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from kuiperllm import LLM, Device, SamplingParams
from machine import write_results
from random_model import random_llm

Workload = tuple[list[list[int]], list[SamplingParams]]


def workload(count: int, shortest: int, longest: int) -> Workload:
    """Prompts of random tokens, and what is asked for each; the same ones every time."""
    numbers = random.Random(0)
    prompts = [
        [numbers.randint(0, 10_000) for _ in range(numbers.randint(shortest, longest))] for _ in range(count)
    ]
    lengths = [numbers.randint(shortest, longest) for _ in range(count)]
    return prompts, [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in lengths]


def measure(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> dict[str, Any]:
    """One run of the workload."""
    runner, before = llm._engine.runner, llm._engine.stats()
    waited, started = runner.device_s, time.perf_counter()
    done = llm.generate(prompts, params)
    seconds = time.perf_counter() - started
    after = llm._engine.stats()
    steps = after.steps - before.steps
    tokens_in, tokens_out = sum(map(len, prompts)), sum(len(each.token_ids) for each in done)
    assert tokens_out == sum(each.max_tokens or 0 for each in params)
    return {
        "seconds": seconds,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "output_tokens_per_s": tokens_out / seconds,
        "tokens_per_s": (tokens_in + tokens_out) / seconds,
        "steps": steps,
        "ms_per_step": 1e3 * seconds / steps,
        "host_ms_per_step": 1e3 * (seconds - runner.device_s + waited) / steps,
        "preemptions": after.preemptions - before.preemptions,
        "median_first_token_s": sorted(each.time_to_first_token_s for each in done)[len(done) // 2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quant")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--shortest", type=int, default=100)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, help="at once (default: all of them)")
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    prompts, params = workload(options.requests, options.shortest, options.longest)
    needed = sum(len(p) + (s.max_tokens or 0) for p, s in zip(prompts, params, strict=True))
    rows = []
    for config in options.configs:
        llm = random_llm(
            config,
            device=options.device,
            quant=options.quant,
            max_model_len=2 * options.longest,
            max_num_seqs=options.max_num_seqs or options.requests,
            max_num_batched_tokens=options.max_num_batched_tokens,
            kv_cache_tokens=max(needed, 2 * options.longest),
            prefix_caching=False,
        )
        started = time.perf_counter()
        llm._engine.warm_up()
        llm.generate(prompts[:2], SamplingParams(temperature=0.6, max_tokens=4, ignore_eos=True))
        row: dict[str, Any] = {"model": config.stem, "warm_up_s": time.perf_counter() - started}
        row["runs"] = [measure(llm, prompts, params) for _ in range(options.repeats)]
        rows.append(row)
        for run in row["runs"]:
            print(
                f"{config.stem:14} {run['output_tokens_per_s']:9,.0f} output tokens/s; "
                f"{run['seconds']:.2f} s, {run['steps']} steps of {run['ms_per_step']:.2f} ms, host busy for "
                f"{run['host_ms_per_step']:.2f} of them; {run['preemptions']} preemptions; "
                f"first token after {run['median_first_token_s']:.2f} s (median)",
                flush=True,
            )
        del llm
    if options.json:
        facts = {"device": options.device, "quant": options.quant or "none"}
        write_results(options.json, Device(options.device), rows, **facts)


if __name__ == "__main__":
    main()
