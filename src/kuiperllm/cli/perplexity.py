"""`kuiper perplexity`: how well a model predicts a text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from kuiperllm.cli.model import load
from kuiperllm.cli.options import (
    EngineOptions,
    Json,
    ModelOptions,
    TextOptions,
    Verbose,
    with_option_groups,
)
from kuiperllm.cli.output import print_json, print_table
from kuiperllm.cli.progress import Reporter
from kuiperllm.cli.text_input import read_file

if TYPE_CHECKING:
    from kuiperllm.engine.llm import LLM
    from kuiperllm.engine.perplexity import Perplexity

EXAMPLES = """\
kuiper perplexity -m model.gguf wiki.test.raw
kuiper perplexity -m ./Llama-3.2-1B --quant q8 --context 2048 --chunks 20 wiki.test.raw
kuiper perplexity -m stories15M.bin --separator "<|endoftext|>" --json stories.txt
"""


@with_option_groups
def perplexity(
    model: ModelOptions,
    text: TextOptions,
    engine: EngineOptions,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A text, in UTF-8; - reads standard input.", show_default=False),
    ],
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Measure how well a model predicts a text, as llama.cpp's perplexity tool does.

    Lower is better; models with different tokenizers cannot be compared by it.
    """
    text.check()
    engine.config()
    content = text.texts(read_file(file))
    with Reporter() as reporter:
        llm = load(model, engine, reporter)
        result = llm.perplexity(
            content, **text.as_arguments(), progress=progress(reporter, "scoring", "perplexity {:.4f}")
        )
    if as_json:
        print_json({"file": file, **described(llm, engine), **result.to_dict()})
    else:
        print_table(
            [
                ("model", name_of(llm)),
                ("text", text_of(file, result)),
                ("perplexity", figure(result)),
                ("mean", f"{result.mean_nll:.5f} nats a token"),
                ("speed", speed(result)),
            ]
        )


def progress(reporter: Reporter, what: str, figure: str) -> Callable[[int, int, float], None]:
    """What tells of progress: tokens per second, and the figure so far."""
    started = time.perf_counter()

    def tell(done: int, total: int, value: float) -> None:
        per_second = done / (time.perf_counter() - started)
        reporter.count(what, done, total, f"{per_second:.0f} tokens/s, {figure.format(value)} so far")

    return tell


def described(llm: LLM, engine: EngineOptions) -> dict[str, object]:
    """What a model is and how it was loaded, for `--json`."""
    decoder = llm.loaded.decoder
    return {
        "model": llm.loaded.name,
        "quant": engine.quant,
        "weights": str(decoder.lm_head.weight.format),
        "weight_bytes": decoder.weight_bytes,
        "device": str(decoder.device),
    }


def name_of(llm: LLM) -> str:
    """A model and how it was loaded, for people."""
    from kuiperllm.core.memory import format_bytes

    decoder = llm.loaded.decoder
    weights = f"weights {decoder.lm_head.weight.format}, {format_bytes(decoder.weight_bytes)}"
    return f"{llm.loaded.name}, {weights}, on {decoder.device}"


def text_of(file: str, result: Perplexity) -> str:
    """What was scored, for people."""
    if result.context is None:
        return f"{file}: {result.num_windows} texts, {result.num_scored} tokens scored"
    each = result.num_scored // result.num_windows
    length = result.num_tokens // result.num_windows
    return f"{file}: {result.num_windows} windows of {length} tokens, the last {each} of each scored"


def figure(result: Perplexity) -> str:
    """A perplexity, for people."""
    form = ".4f" if result.perplexity < 1e6 else ".4g"
    return f"{result.perplexity:{form}} ± {result.standard_error:{form}}"


def speed(result: Perplexity) -> str:
    """Tokens per second, for people."""
    return f"{result.tokens_per_s:.1f} tokens/s ({result.num_tokens} tokens in {result.seconds:.2f} s)"
