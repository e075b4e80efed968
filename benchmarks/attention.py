"""Times attention on a GPU by replaying graphs: prefill in TFLOPS, decode in per cent of the bandwidth.

Decode goes round as many layers as it takes to hold more keys and values than the caches of the chip. "Fused"
is the first kernel of a decode step, which also prepares and stores the new key: a query head for each block,
or tensor cores, from which `self_attention` chooses by context.

    python benchmarks/attention.py [--device cuda:0] [--portable] [--parts N] [--json results.json]
    python benchmarks/attention.py --sweep [--json results.json]

With `--sweep`, ways to do the attention of a decode step are checked and tried, between the products that it
stands between: numbers of parts, how the kernel on tensor cores works, when kernels start.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from attention_data import DTYPE, batch_of, caches, layers_for, random, seconds_per_replay
from attention_sweep import sweep
from kuiperllm.backends.cuda.launch import chip
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.attention import attention, cuda, cuda_decode
from machine import write_results

PREFILLS_PER_GRAPH = 4
PREFILL_TOKENS = (512, 2048, 8192)
CONTEXTS = (1024, 8192, 32_768)
FUSED_CONTEXTS = (128, 512, 1024, 4096, 8192, 32_768)
WAYS = {False: (("heads", 4), ("heads", 8), ("tensor", 8)), True: (("tensor", 8), ("tensor", 16))}
"""Kernels and numbers of parts, by whether the context is long."""


@dataclass(frozen=True)
class Shape:
    """The attention of a model."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = (
    Shape("Llama-3.2-1B", 32, 8, 64),
    Shape("Llama-3.1-8B", 32, 8, 128),
    Shape("Qwen3-0.6B", 16, 8, 128),
)


@dataclass(frozen=True)
class Result:
    """One measurement; `score` is TFLOPS, or per cent of the bandwidth."""

    kind: str
    model: str
    tokens: int
    us: float
    score: float


def prefill(shape: Shape, tokens: int, device: Device) -> Result:
    """A prompt of so many tokens."""
    q, out = (random((tokens, shape.heads, shape.head_dim), device) for _ in "qo")
    (keys_values,) = caches(tokens, shape.kv_heads, shape.head_dim, 1, device)
    batch = batch_of(tokens, tokens, device)

    def pass_() -> None:
        for _ in range(PREFILLS_PER_GRAPH):
            attention(q, keys_values, batch, shape.head_dim**-0.5, out=out)

    seconds = seconds_per_replay(pass_, device) / PREFILLS_PER_GRAPH
    operations = 4 * shape.heads * shape.head_dim * tokens * (tokens + 1) / 2
    return Result("prefill", shape.model, tokens, seconds * 1e6, operations / seconds / 1e12)


def kv_bytes(shape: Shape, tokens: int) -> int:
    """Of one layer."""
    return 2 * tokens * shape.kv_heads * shape.head_dim * DTYPE.itemsize


def decode(shape: Shape, tokens: int, device: Device, bandwidth: float) -> Result:
    """One token after so many."""
    count = layers_for(kv_bytes(shape, tokens))
    layers = caches(tokens, shape.kv_heads, shape.head_dim, count, device)
    q, out = (random((1, shape.heads, shape.head_dim), device) for _ in "qo")
    batch = batch_of(1, tokens, device)

    def step() -> None:
        for keys_values in layers:
            attention(q, keys_values, batch, shape.head_dim**-0.5, out=out)

    seconds = seconds_per_replay(step, device) / len(layers)
    score = 100 * kv_bytes(shape, tokens) / seconds / bandwidth
    return Result("decode", shape.model, tokens, seconds * 1e6, score)


def fused(shape: Shape, tokens: int, kernel: str, parts: int, device: Device, bandwidth: float) -> Result:
    """The first kernel of a decode step, by the way of that name."""
    count = layers_for(kv_bytes(shape, tokens))
    layers = caches(tokens, shape.kv_heads, shape.head_dim, count, device)
    run = {"heads": cuda_decode.decode_scalar, "tensor": cuda_decode.decode_mma}[kernel]
    qkv = random((1, (shape.heads + 2 * shape.kv_heads) * shape.head_dim), device)
    partial = random((1, parts, shape.heads, shape.head_dim), device)
    stats = Tensor.empty((1, parts, shape.heads, 2), DType.float32, device)
    newest = cuda_decode.Newest(
        Tensor.zeros((tokens, shape.head_dim), DType.float32, device), None, None, 0.0
    )
    batch = batch_of(1, tokens, device)

    def step() -> None:
        for keys_values in layers:
            run(qkv, keys_values, batch, shape.head_dim**-0.5, partial, stats, newest)

    seconds = seconds_per_replay(step, device) / len(layers)
    score = 100 * kv_bytes(shape, tokens) / seconds / bandwidth
    return Result(f"fused, {kernel}, {parts} parts", shape.model, tokens, seconds * 1e6, score)


def show(results: list[Result], title: str) -> None:
    """A table for people."""
    table = Table("kind", "model", title=title)
    for name in ("tokens", "µs", "TFLOPS or % of bandwidth"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(r.kind, r.model, str(r.tokens), f"{r.us:.2f}", f"{r.score:.1f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--portable", action="store_true", help="prefill by the kernel for all chips, also on Hopper"
    )
    parser.add_argument("--parts", type=int, help="split contexts of decode into so many parts")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--sweep", action="store_true", help="try ways to do the attention of a decode step")
    options = parser.parse_args()
    device = Device(options.device)
    cuda.USE_HOPPER = not options.portable
    if options.parts:
        vars(cuda)["parts_for"] = lambda *_: options.parts
    bandwidth = device.backend.read_bandwidth()
    facts = {"read_bytes_per_s": bandwidth, "portable": options.portable}
    if options.sweep:
        found = [asdict(measured) for measured in sweep(device, bandwidth)]
        if options.json:
            write_results(options.json, device, found, **facts)
        return
    results = [prefill(shape, tokens, device) for shape in SHAPES for tokens in PREFILL_TOKENS]
    results += [decode(shape, tokens, device, bandwidth) for shape in SHAPES for tokens in CONTEXTS]
    for shape in SHAPES:
        for tokens in FUSED_CONTEXTS:
            results += [fused(shape, tokens, *way, device, bandwidth) for way in WAYS[tokens > 1024]]
    show(results, f"{chip(device).name}, reads {bandwidth / 1e9:.0f} GB/s")
    if options.json:
        write_results(options.json, device, [asdict(result) for result in results], **facts)


if __name__ == "__main__":
    main()
