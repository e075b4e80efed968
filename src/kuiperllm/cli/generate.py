"""`kuiper generate`: continue a text."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuiperllm.cli.model import load
from kuiperllm.cli.options import (
    EngineOptions,
    Json,
    ModelOptions,
    SamplingOptions,
    Verbose,
    with_option_groups,
)
from kuiperllm.cli.output import print_json, write
from kuiperllm.cli.progress import Reporter
from kuiperllm.cli.streaming import show_stream, speed, token_text
from kuiperllm.cli.text_input import read_text
from kuiperllm.config import SamplingParams

if TYPE_CHECKING:
    from kuiperllm.engine.llm import LLM
    from kuiperllm.engine.output import Chunk, Completion
    from kuiperllm.engine.sequence import TokenLogprobs
    from kuiperllm.text import Tokenizer

MAX_TOKENS = 256

EXAMPLES = """\
kuiper generate "ROMEO:"
kuiper generate -m Qwen/Qwen2.5-0.5B --quant q8 --max-tokens 50 "The sky is"
kuiper generate -m model.gguf --temperature 0 --stop "\\n\\n" --json "Q: why?"
cat story.txt | kuiper generate --echo --seed 1
"""


@with_option_groups
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    engine: EngineOptions,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; - or nothing reads standard input.", show_default=False),
    ] = None,
    echo: Annotated[
        bool, typer.Option("--echo", help="Print the prompt in front of its continuation.")
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="One line for each token: its log probability and the N most likely ones.",
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tell the speed on stderr; so does -v.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Continue a text. It is printed as it is made."""
    fallbacks = {"max_tokens": max(MAX_TOKENS, sampling.min_tokens or 0), "logprobs": logprobs}
    sampling.params(SamplingParams(), **fallbacks)  # refuses impossible values before the model is loaded
    engine.config()
    text = read_text(prompt, "prompt")
    with Reporter() as reporter:
        started = time.perf_counter()
        llm = _load_for(text, sampling.max_tokens, model, engine, reporter)
        load_s = time.perf_counter() - started
        params = sampling.params(llm.default_params, **fallbacks)
        if as_json:
            completion = llm.generate(text, params)[0]
            print_json(as_object(llm, text, completion, load_s))
            return
        completion = _print_stream(llm, text, params, echo, reporter)
    if stats or verbose:
        print(f"{speed(completion)}; model loaded in {load_s:.2f} s", file=sys.stderr)


def _load_for(
    text: str, max_tokens: int | None, model: ModelOptions, engine: EngineOptions, reporter: Reporter
) -> LLM:
    """The model, with room for as many tokens as were asked for by number.

    Some checkpoints state a shorter context than they can do. Who names `--max-tokens` gets them, and a
    warning; who names `--max-model-len` gets that.
    """
    llm = load(model, engine, reporter)
    if max_tokens is None or engine.max_model_len is not None:
        return llm
    needed = len(llm.tokenizer.encode(text)) + max_tokens
    if needed <= llm.max_model_len or llm.max_model_len < llm.config.max_position_embeddings:
        return llm
    return load(model, replace(engine, max_model_len=needed), reporter)


def _print_stream(llm: LLM, text: str, params: SamplingParams, echo: bool, reporter: Reporter) -> Completion:
    chunks = llm.stream(text, params)
    if params.logprobs is not None:
        return show_stream(chunks, reporter, lambda chunk: _logprobs_line(chunk, llm.tokenizer))
    if echo:
        reporter.clear()
        write(text)
    completion = show_stream(chunks, reporter, lambda chunk: chunk.text)
    write("\n")
    return completion


def _logprobs_line(chunk: Chunk, tokenizer: Tokenizer) -> str:
    """One token as a line: its log probability, its text, and the alternatives."""
    assert chunk.logprobs is not None
    others = "  ".join(f"{logprob:.4f} {token_text(i, tokenizer)!r}" for i, logprob in chunk.logprobs.top)
    return (
        f"{chunk.logprobs.logprob:9.4f} {token_text(chunk.token_id, tokenizer)!r:<16} {others}".rstrip()
        + "\n"
    )


def as_object(llm: LLM, prompt: str, completion: Completion, load_s: float) -> dict[str, Any]:
    """A completion for `--json`."""
    return {
        "model": llm.loaded.name,
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_token_ids": completion.prompt_token_ids,
        "token_ids": completion.token_ids,
        "logprobs": None
        if completion.logprobs is None
        else [_logprobs_object(entry, llm.tokenizer) for entry in completion.logprobs],
        "load_s": load_s,
        "time_to_first_token_s": completion.time_to_first_token_s,
        "decode_tokens_per_s": completion.decode_tokens_per_s,
    }


def _logprobs_object(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    def named(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token_id": token_id, "token": token_text(token_id, tokenizer), "logprob": logprob}

    return named(entry.token_id, entry.logprob) | {"top": [named(*candidate) for candidate in entry.top]}
