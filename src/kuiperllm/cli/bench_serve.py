"""`kuiper bench serve`: how a server answers under load."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuiperllm.cli.options import Json, Verbose
from kuiperllm.cli.output import print_json, print_table
from kuiperllm.cli.progress import Reporter
from kuiperllm.config import settings
from kuiperllm.errors import KuiperError

if TYPE_CHECKING:
    from kuiperllm.server.load.run import LoadResult

EXAMPLES = """\
kuiper bench serve --requests 64 --concurrency 8
kuiper bench serve --url http://127.0.0.1:8000 --rate 4 --requests 200 --plot load.svg --json
"""


def serve(
    url: Annotated[
        str, typer.Option(metavar="URL", help="Address of a server of OpenAI's API, without /v1.")
    ] = "http://127.0.0.1:8000",
    served_name: Annotated[
        str | None, typer.Option(metavar="NAME", show_default=False, help="Which model. Default: the first.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", show_default=False, help="Default: KUIPER_API_KEY.")
    ] = None,
    requests: Annotated[int, typer.Option(metavar="N", help="How many.")] = 64,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R", show_default=False, help="Requests a second, at random times. Default: all at once."
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", show_default=False, help="Most requests under way. Default: no limit."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Length of the prompts.")] = 128,
    gen_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate.")] = 64,
    spread: Annotated[
        float, typer.Option(metavar="S", help="Draw lengths from 1 - S to 1 + S times these; 0 to below 1.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of lengths, prompts and times.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Draw the times into this SVG file."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Put load on a running server; say how long answers take, and how many tokens come in a second."""
    from kuiperllm.server.load.client import Target
    from kuiperllm.server.load.plot import svg
    from kuiperllm.server.load.run import LoadConfig, run_load

    config = LoadConfig(
        num_requests=requests,
        rate=math.inf if rate is None else rate,
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        spread=spread,
        temperature=temperature,
        seed=seed,
    )
    keys = settings().api_keys
    target = Target(url.rstrip("/").removesuffix("/v1"), api_key or (keys[0] if keys else None))
    with Reporter() as reporter:

        def tell(done: int, total: int) -> None:
            reporter.count("requests", done, total, f"{done} of {total}")

        try:
            result = asyncio.run(run_load(target, config, served_name, tell))
        except OSError as error:
            raise KuiperError(f"{url}: {error.strerror or error}; is a server running there?") from None
    if plot is not None:
        plot.write_text(svg(result), encoding="utf-8")
    if as_json:
        print_json(result.to_dict())
    else:
        print_table(_rows(result))


def _rows(result: LoadResult) -> list[tuple[str, object]]:
    found = result.to_dict()

    def times(name: str) -> str:
        one: dict[str, Any] | None = found[name]
        return "-" if one is None else ", ".join(f"{key} {value:,.1f}" for key, value in one.items())

    errors = ", ".join(f"{count} x {error}" for error, count in found["errors"].items())
    rows: list[tuple[str, object]] = [
        ("model", found["model"]),
        ("requests", f"{found['answered']} of {found['requests']} answered in {found['duration_s']:.2f} s"),
        ("errors", errors or "none"),
        (
            "throughput",
            f"{found['output_tokens_per_s']:,.1f} output tokens/s, {found['total_tokens_per_s']:,.1f} with "
            f"prompts, {found['requests_per_s']:.2f} requests/s",
        ),
    ]
    labels = {"ttft_ms": "first token, ms", "tpot_ms": "per token, ms", "e2e_ms": "whole, ms"}
    return rows + [(label, times(name)) for name, label in labels.items()]
