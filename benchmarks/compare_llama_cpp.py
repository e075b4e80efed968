"""KuiperLLM against llama.cpp on the CPU, side by side in one run.

    python benchmarks/compare_llama_cpp.py                  # both shapes, q8 and bf16, 5 rounds, 2 threads
    python benchmarks/compare_llama_cpp.py --formats q8 --rounds 9
    python benchmarks/compare_llama_cpp.py --only llama.cpp # the peer alone
    python benchmarks/compare_llama_cpp.py --torch PYTHON   # prefill beside torch in bfloat16 as well

Models of random weights in the shapes of `benchmarks/configs/*.json`; the whole network with attention and
the output projection over the whole vocabulary. Two figures each:

* prefill: prompt tokens / seconds from the token ids of a prompt (512) to its first output token, with an
  empty KV cache; logits of the last token only.
* decode: tokens / seconds of greedy tokens (64), one forward pass each, after a prompt (128) that is not
  timed.

Timed on both sides: the forward pass, and the choice of the most likely token; for KuiperLLM also its
scheduler and everything else that Python does per token. Not timed: loading, compiling, packing, clearing the
cache, text. Each engine lives in its own process with the model loaded and sleeps while another works. A
round is: llama.cpp prefill, KuiperLLM prefill, read bandwidth, llama.cpp decode, KuiperLLM decode, read
bandwidth again (the better one counts); one round before the first warms up. What counts is the median of the
ratios taken within each round. A round in which other programs used the processor is kept in the file but
repeated: spinning threads lose most of their speed when one of their processors is taken. The memory of a
shared host may be slowed by neighbours that this machine cannot see, so decode is also given as a share of
the bandwidth measured beside it.

llama.cpp runs at its best: built for this processor (`peers.py`), its C API called directly, the prompt as
one batch, n_ubatch = n_batch (smaller ones were no faster), flash attention on (prefill gained 5-13 %, decode
nothing), the file memory-mapped (reading it into huge pages was no faster), glibc told to back large buffers
with huge pages. Its weights: every matrix Q8_0 (blocks of 32 with a float16 scale), or BF16, or F16, the tied
embedding included; its KV cache is float16. On x86 it repacks Q8_0 for AMX only; without AMX, prefill is
llamafile's 256-bit AVX-VNNI kernel, decode a dot product per row.

With `--torch`, an interpreter that has torch and transformers, the same shape in bfloat16 takes part in the
prefill of each round (`worker_torch.py`).

Needs a C++ compiler and a few GB in the scratch folder. With GCC 12.2 on a processor with AMX llama.cpp's AMX
kernels crash, because that compiler miscompiles `_tile_loadconfig`: set CC and CXX to another one (and delete
the scratch folder if it was built before).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from machine import OtherLoad, compiler_version, processor
from peers import Peers, say
from workers import Worker

HERE = Path(__file__).parent
PEER, OURS, TORCH = "llama.cpp", "KuiperLLM", "torch bf16"
Round = dict[str, Any]  # engine name -> its seconds; read_bandwidth, other_load, quiet
SETTLE_S = 0.2  # lets spinning threads of the engine that just worked fall asleep


@dataclass(frozen=True)
class Format:
    """One weight format on both sides."""

    gguf: str
    quant: str | None
    dtype: str
    group_size: int = 64
    gguf_bytes_per_weight: float | None = 2.0
    """None: types are mixed, and the file's size counts, embedding included."""
    same_file: bool = False
    """KuiperLLM loads the GGUF file too."""


FORMATS = {
    "q8": Format(gguf="Q8_0", quant="q8", dtype="bfloat16", gguf_bytes_per_weight=34 / 32),
    "q4": Format(gguf="Q4_0", quant="q4", dtype="bfloat16", group_size=32, gguf_bytes_per_weight=18 / 32),
    "q4_k_m": Format(gguf="Q4_K_M", quant=None, dtype="auto", gguf_bytes_per_weight=None, same_file=True),
    "bf16": Format(gguf="BF16", quant=None, dtype="bfloat16"),
    "f16": Format(gguf="F16", quant=None, dtype="float16"),
}


@dataclass(frozen=True)
class Cell:
    """What is measured at one place of the table."""

    config: Path
    format_name: str

    @property
    def format(self) -> Format:
        return FORMATS[self.format_name]


def gguf_bytes_per_token(config: dict[str, Any], bytes_per_weight: float) -> int:
    """Bytes of a GGUF file's matrices that one decoded token reads: all layers and the output projection."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    per_layer = hidden * (heads * head_dim + 3 * ffn)
    weights = config["num_hidden_layers"] * per_layer + config["vocab_size"] * hidden
    return int(weights * bytes_per_weight)


def load(workers: dict[str, Worker], cell: Cell, peers: Peers, args: argparse.Namespace) -> dict[str, int]:
    """Load the cell's model in every engine; the bytes of weights that each reads for a decoded token."""
    config = json.loads(cell.config.read_text())
    read = {}
    path = peers.gguf(cell.config, cell.format.gguf) if PEER in workers or cell.format.same_file else None
    if PEER in workers:
        assert path is not None
        workers[PEER].ask(
            "load",
            path=str(path),
            threads=args.threads,
            context=max(args.prefill, args.prompt + args.tokens),
            batch=max(args.prefill, args.prompt),
            flash_attn=args.llama_flash_attn,
            load_mode=args.llama_load_mode,
        )
        per_weight = cell.format.gguf_bytes_per_weight
        read[PEER] = path.stat().st_size if per_weight is None else gguf_bytes_per_token(config, per_weight)
    if OURS in workers:
        answer = workers[OURS].ask(
            "load",
            config=config,
            path=str(path) if cell.format.same_file else None,
            quant=cell.format.quant,
            group_size=cell.format.group_size,
            dtype=cell.format.dtype,
            threads=args.threads,
        )
        read[OURS] = answer["bytes_per_token"]
    if TORCH in workers:
        workers[TORCH].ask("load", config=config, threads=args.threads)
    return read


def measure(
    workers: dict[str, Worker], bandwidth: Worker, args: argparse.Namespace
) -> tuple[list[Round], bool]:
    """Rounds until enough of them were quiet, and whether enough were. The warm-up before them is left out.

    A round that other programs disturbed by more than `--max-other-load` is measured again, until there are
    three times as many rounds as asked for.
    """
    other_load = OtherLoad([worker.process.pid for worker in (bandwidth, *workers.values())])
    rounds: list[Round] = []
    run_round(workers, bandwidth, args)
    other_load.restart()
    while len(rounds) < 3 * args.rounds and sum(r["quiet"] for r in rounds) < args.rounds:
        taken = run_round(workers, bandwidth, args)
        taken["other_load"] = other_load.restart()
        taken["quiet"] = taken["other_load"] <= args.max_other_load
        rounds.append(taken)
    return rounds, sum(r["quiet"] for r in rounds) == args.rounds


def run_round(workers: dict[str, Worker], bandwidth: Worker, args: argparse.Namespace) -> Round:
    """Every figure of every engine once, one engine at a time."""
    taken: Round = {name: {} for name in workers}
    for name, worker in workers.items():
        time.sleep(SETTLE_S)
        taken[name]["prefill_s"] = worker.ask("prefill", tokens=args.prefill)
    before = bandwidth.ask("read_bandwidth", threads=args.threads)
    for name, worker in workers.items():
        if name == TORCH:
            continue
        time.sleep(SETTLE_S)
        taken[name]["decode_s"] = worker.ask("decode", prompt=args.prompt, tokens=args.tokens)
    after = bandwidth.ask("read_bandwidth", threads=args.threads)
    taken["read_bandwidth"] = max(before, after)
    return taken


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def summarize(
    rounds: list[Round], bytes_per_token: dict[str, int], args: argparse.Namespace
) -> dict[str, Any]:
    """Medians, extremes, ratios within rounds, and how much of the bandwidth decode reaches.

    `bytes_per_token` is by engine.
    """
    engines = [name for name in (PEER, OURS) if name in rounds[0]]
    speeds = {
        name: {
            "prefill": [args.prefill / r[name]["prefill_s"] for r in rounds],
            "decode": [args.tokens / r[name]["decode_s"] for r in rounds],
        }
        for name in engines
    }
    if TORCH in rounds[0]:
        speeds[TORCH] = {"prefill": [args.prefill / r[TORCH]["prefill_s"] for r in rounds]}
    read = [r["read_bandwidth"] for r in rounds]
    summary: dict[str, Any] = {
        "rounds": len(rounds),
        "other_load_processors": spread([r["other_load"] for r in rounds]),
        "read_bandwidth_bytes_per_s": spread(read),
        "weight_bytes_per_token": bytes_per_token,
        "tokens_per_s": {
            n: {figure: spread(v) for figure, v in taken.items()} for n, taken in speeds.items()
        },
        "decode_share_of_bandwidth": {
            name: spread(
                [
                    speed * bytes_per_token[name] / rate
                    for speed, rate in zip(taken["decode"], read, strict=True)
                ]
            )
            for name, taken in speeds.items()
            if "decode" in taken
        },
    }
    for key, other in (("ratio", PEER), ("ratio_to_torch", TORCH)):
        if OURS in speeds and other in speeds:
            summary[key] = {
                figure: spread([a / b for a, b in zip(speeds[OURS][figure], theirs, strict=True)])
                for figure, theirs in speeds[other].items()
            }
    return summary


def show(cell: Cell, summary: dict[str, Any]) -> None:
    """Print one cell of the result as text."""

    def text(values: dict[str, float], digits: int = 1, scale: float = 1) -> str:
        middle, low, high = (f"{values[key] * scale:.{digits}f}" for key in ("median", "min", "max"))
        return f"{middle} ({low}-{high})"

    read = text(summary["read_bandwidth_bytes_per_s"], scale=1e-9)
    other = text(summary["other_load_processors"], digits=2)
    print(f"\n{cell.config.stem} {cell.format_name} (GGUF {cell.format.gguf}): median (min-max) of rounds")
    print(f"  read bandwidth {read} GB/s; processors taken by other programs {other}")
    print(f"  {'':10}{'prefill, tokens/s':>22}{'decode, tokens/s':>22}{'% of bandwidth':>20}")
    for name, figures in summary["tokens_per_s"].items():
        line = f"  {name:10}{text(figures['prefill']):>22}"
        if "decode" in figures:
            share = text(summary["decode_share_of_bandwidth"][name], digits=0, scale=100)
            line += f"{text(figures['decode']):>22}{share:>20}"
        print(line)
    if ratio := summary.get("ratio"):
        print(f"  {'ratio':10}{text(ratio['prefill'], 2):>22}{text(ratio['decode'], 2):>22}")
    if ratio := summary.get("ratio_to_torch"):
        print(f"  {'to torch':10}{text(ratio['prefill'], 2):>22}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "scratch" / "peers")
    parser.add_argument("--configs", type=Path, nargs="+", default=sorted((HERE / "configs").glob("*.json")))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["q8", "bf16"])
    parser.add_argument("--only", choices=(PEER, OURS), help="measure one engine, without ratios")
    parser.add_argument(
        "--torch",
        type=Path,
        metavar="PYTHON",
        help="interpreter with torch and transformers: compare the prefill with torch in bfloat16, too",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--max-other-load",
        type=float,
        default=0.1,
        help="processors that other programs may take during a round, else it is repeated",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in front of the decode")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded")
    parser.add_argument("--llama-flash-attn", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--llama-load-mode", choices=("mmap", "read"), default="mmap")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/<date>-cpu-llama-cpp.json)")
    args = parser.parse_args()
    for name in ("rounds", "threads", "prefill", "prompt", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for config in args.configs:
        if not config.is_file():
            parser.error(f"{config} does not exist")
    return args


def check_torch(python: Path) -> None:
    """Leave with one line if an interpreter has no torch."""
    try:
        subprocess.run([python, "-c", "import torch, transformers"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"{python} cannot import torch and transformers; --torch wants one that can"
        ) from None


def main() -> None:
    args = parse_args()
    if args.torch is not None:
        check_torch(args.torch)
    today = datetime.date.today().isoformat()
    output = args.output or HERE / "results" / f"{today}-cpu-llama-cpp.json"
    peers = Peers(args.scratch)
    peers.prepare()
    commands: dict[str, Sequence[object]] = {
        PEER: [peers.python, HERE / "worker_llama_cpp.py"],
        OURS: [sys.executable, HERE / "worker_kuiper.py"],
    }
    if args.torch is not None:
        commands[TORCH] = [args.torch, HERE / "worker_torch.py"]
    environments = {PEER: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
    with contextlib.ExitStack() as stack:

        def start(name: str, command: Sequence[object], env: dict[str, str]) -> Worker:
            return stack.enter_context(Worker(name, command, peers.logs / f"{name}.log", env))

        workers = {
            name: start(name, command, environments.get(name, {}))
            for name, command in commands.items()
            if args.only in (None, name)
        }
        bandwidth_command = [peers.python, HERE / "worker_bandwidth.py", peers.read_bandwidth_library]
        bandwidth = start("bandwidth", bandwidth_command, {})
        result: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "processor": processor(),
            "system": platform.platform(),
            "compiler": compiler_version(),
            "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path | list)},
            "engines": {name: worker.ask("info") for name, worker in workers.items()},
            "cells": [],
        }
        for config in args.configs:
            for format_name in args.formats:
                cell = Cell(config, format_name)
                say(f"measuring {config.stem} {format_name}")
                bytes_per_token = load(workers, cell, peers, args)
                rounds, quiet = measure(workers, bandwidth, args)
                if not quiet:
                    say(f"other programs used the processor in most of {len(rounds)} rounds; counting all")
                counted = [r for r in rounds if r["quiet"]] if quiet else rounds
                summary = summarize(counted, bytes_per_token, args)
                show(cell, summary)
                where = {"config": config.stem, "format": format_name, "gguf": cell.format.gguf}
                result["cells"].append(where | {"quiet": quiet} | summary | {"samples": rounds})
                for worker in workers.values():
                    worker.ask("unload")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
