"""`kuiper info`: what a checkpoint holds and what running it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kuiperllm.cli.interrupts import import_engine
from kuiperllm.cli.model import reported_name
from kuiperllm.cli.options import EngineOptions, Json, ModelOptions, Verbose, with_option_groups
from kuiperllm.cli.output import print_json, print_table
from kuiperllm.cli.progress import Reporter
from kuiperllm.errors import CheckpointError, KuiperError, OutOfMemoryError

if TYPE_CHECKING:
    from kuiperllm.checkpoint import Checkpoint

EXAMPLES = """\
kuiper info
kuiper info -m ./Llama-3.2-1B-Instruct --quant q8
kuiper info -m model.gguf --max-model-len 4096 --json
kuiper info -m ./Llama-3.2-1B-Instruct --check
"""

_MOST_NAMED = 3  # damaged tensors in one message


@with_option_groups
def info(
    model: ModelOptions,
    engine: EngineOptions,
    check: Annotated[
        bool, typer.Option("--check", help="Read all weights, and report those that are NaN or infinite.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Show a model's format, configuration, sizes, tokenizer and memory need. No weights are loaded.

    With --check the exit code is 1 if a weight is NaN or infinite.
    """
    engine.config()
    import_engine()
    from kuiperllm.checkpoint.check import find_bad_tensors
    from kuiperllm.engine.loading import open_model

    with Reporter() as reporter, open_model(model.model, reporter.advance) as checkpoint:
        facts = {
            "model": reported_name(model),
            "path": str(checkpoint.path),
            "format": checkpoint.format,
            "architecture": checkpoint.config.model_type,
            **_tensors(checkpoint),
            "config": checkpoint.config.to_hf(),
            "tokenizer": _tokenizer(checkpoint, model),
            "memory": _memory(checkpoint, engine),
        }
        bad = find_bad_tensors(checkpoint, reporter.advance) if check else []
        if check:
            facts["bad_tensors"] = [asdict(tensor) for tensor in bad]
    if as_json:
        print_json(facts)
    else:
        rows = _rows(facts)
        if check and not bad:
            rows.append(("check", "every weight is a finite number"))
        print_table(rows)
    if bad:
        more = f", and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        raise CheckpointError(
            f"{facts['path']}: weights are damaged: {'; '.join(map(str, bad[:_MOST_NAMED]))}{more}; "
            "get the model again"
        )


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    infos = checkpoint.tensors.values()
    by_dtype: Counter[str] = Counter()
    for tensor in infos:
        by_dtype[tensor.dtype] += prod(tensor.shape)
    counts = Counter(tensor.dtype for tensor in infos)
    return {
        "tensors": len(infos),
        "parameters": sum(by_dtype.values()),
        "parameters_by_dtype": dict(by_dtype.most_common()),
        "tensors_by_dtype": {dtype: counts[dtype] for dtype, _ in by_dtype.most_common()},
        "file_bytes": sum(tensor.nbytes for tensor in infos),
    }


def _tokenizer(checkpoint: Checkpoint, model: ModelOptions) -> dict[str, Any]:
    """Facts about the tokenizer; why there is none, if so: the rest is worth showing all the same."""
    from kuiperllm.engine.loading import open_tokenizer

    try:
        tokenizer = open_tokenizer(checkpoint, model.tokenizer)
    except KuiperError as error:
        if model.tokenizer is not None:
            raise
        return {"problem": str(error)}
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": len(tokenizer.special_tokens),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": list(tokenizer.eos_token_ids),
        "chat_template": tokenizer.chat_template is not None,
    }


def _memory(checkpoint: Checkpoint, engine: EngineOptions) -> dict[str, Any]:
    """The plan; if the model does not fit, what is lacking."""
    from kuiperllm.core import Device
    from kuiperllm.engine.memory_plan import plan_memory

    config = engine.config()
    try:
        plan = plan_memory(checkpoint, config, Device(config.device))
    except OutOfMemoryError as error:
        return {"fits": False, "problem": str(error)}
    return {"fits": True, **asdict(plan), "kv_bytes": plan.kv_bytes}


def _rows(facts: dict[str, Any]) -> list[tuple[str, object]]:
    from kuiperllm.core.memory import format_bytes

    dtypes = ", ".join(
        f"{dtype}: {_count(n)} in {facts['tensors_by_dtype'][dtype]}"
        for dtype, n in facts["parameters_by_dtype"].items()
    )
    rows: list[tuple[str, object]] = [
        (name, facts[name]) for name in ("model", "path", "format", "architecture")
    ]
    rows += [
        ("parameters", f"{_count(facts['parameters'])} in {facts['tensors']} tensors"),
        ("stored as", dtypes),
        ("size", format_bytes(facts["file_bytes"])),
    ]
    config = {k: v for k, v in facts["config"].items() if k != "model_type"}
    rows += [("config" if i == 0 else "", f"{k} = {v}") for i, (k, v) in enumerate(config.items())]
    tokenizer, memory = facts["tokenizer"], facts["memory"]
    if "problem" in tokenizer:
        rows.append(("tokenizer", f"none: {tokenizer['problem']}"))
    else:
        rows.append(("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']} tokens"))
        rows.append(("chat template", "yes" if tokenizer["chat_template"] else "no"))
    if not memory["fits"]:
        rows.append(("memory", memory["problem"]))
        return rows
    per_token, length = format_bytes(memory["kv_bytes_per_token"]), memory["max_model_len"]
    return [
        *rows,
        ("memory", f"weights {format_bytes(memory['weight_bytes'])}"),
        ("", f"KV cache {per_token} per token, {format_bytes(memory['kv_bytes'])} for {length} tokens"),
        ("", f"{format_bytes(memory['free_bytes'])} free"),
    ]


def _count(number: int) -> str:
    """A number of parameters as people write it."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
