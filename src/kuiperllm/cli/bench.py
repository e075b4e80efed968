"""`kuiper bench`: how fast a model runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kuiperllm.cli.interrupts import import_engine
from kuiperllm.cli.options import EngineOptions, Json, ModelOptions, Verbose, with_option_groups
from kuiperllm.cli.output import print_json, print_table
from kuiperllm.cli.progress import Reporter
from kuiperllm.errors import UsageError

if TYPE_CHECKING:
    from kuiperllm.config import ModelConfig
    from kuiperllm.engine.bench import BenchResult

EXAMPLES = """\
kuiper bench
kuiper bench -m model.gguf --prompt-tokens 512 --gen-tokens 128 --json
kuiper bench --config Llama-3.2-1B/config.json --random-weights --quant q8 --threads 2
"""


@with_option_groups
def bench(
    context: typer.Context,
    model: ModelOptions,
    engine: EngineOptions,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="A config.json: with --random-weights, no model is needed.",
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Make a model of the shape that --config states.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the prompt.")] = 512,
    gen_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="How often; medians are reported.")] = 3,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Measure prefill and decode speed, and what part of the memory's bandwidth decoding reaches."""
    if context.invoked_subcommand is not None:
        return
    if random_weights != (config is not None):
        raise UsageError("--random-weights and --config FILE go together")
    if config is not None and model.model is not None:
        raise UsageError("give either --model or --config with --random-weights, not both")
    engine_config = engine.config()
    import_engine()
    with Reporter() as reporter:
        shape = None if config is None else _read_config(config)
        from kuiperllm.engine.bench import run_bench

        result = run_bench(
            model.model,
            engine_config,
            config=shape,
            prompt_tokens=prompt_tokens,
            gen_tokens=gen_tokens,
            repeats=repeats,
            progress=reporter.advance,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_table(_rows(result))


def _read_config(path: Path) -> ModelConfig:
    from kuiperllm.checkpoint.json_file import read_config
    from kuiperllm.config import ModelConfig

    return ModelConfig.from_hf(read_config(path), where=str(path))


def _rows(result: BenchResult) -> list[tuple[str, object]]:
    from kuiperllm.core.memory import format_bytes

    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    memory = f"{format_bytes(result.peak_memory_bytes)} resident at most"
    if not result.threads:
        memory += f", {format_bytes(result.peak_device_bytes)} on the GPU"
    return [
        ("model", f"{result.model}, quant {result.quant}, weights {result.dtype}"),
        (
            "machine",
            f"{result.chip}, {result.device}" + (f", {result.threads} threads" if result.threads else ""),
        ),
        ("load", f"{result.load_s:.2f} s, weights {format_bytes(result.weight_bytes)}"),
        ("prefill", f"{result.prefill_tokens_per_s:.1f} tokens/s ({result.prompt_tokens} tokens)"),
        (
            "decode",
            f"{result.decode_tokens_per_s:.1f} tokens/s, {result.decode_ms_per_token:.2f} ms per token, "
            f"of that {result.python_ms_per_token:.2f} ms outside kernels ({result.gen_tokens} tokens)",
        ),
        (
            "bandwidth",
            f"{result.decode_bytes_per_s / 1e9:.1f} GB/s while decoding, {result.percent_of_bandwidth:.0f} % "
            f"of the {result.read_bandwidth_bytes_per_s / 1e9:.1f} GB/s that reading alone reaches",
        ),
        ("memory", memory),
        ("measured", f"{result.date}, median of {result.repeats}; {versions}"),
    ]
