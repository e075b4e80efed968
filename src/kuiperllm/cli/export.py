"""`kuiper export`: write a model in another format, or with fewer bits to a weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kuiperllm.cli.interrupts import import_engine, stopped_by_signals
from kuiperllm.cli.options import Json, ModelOptions, Verbose, with_option_groups
from kuiperllm.cli.output import print_json, print_table, write
from kuiperllm.cli.progress import Reporter
from kuiperllm.cli.text_input import read_file

if TYPE_CHECKING:
    from kuiperllm.checkpoint.writing.convert import TensorReport
    from kuiperllm.engine.export import ExportReport

EXAMPLES = """\
kuiper export -m ./Llama-3.2-1B-Instruct --quant q4 ./Llama-3.2-1B-q4
kuiper export -m Qwen/Qwen2.5-0.5B-Instruct --quant q4_k_m qwen2.5-0.5b.gguf
kuiper export -m ./Llama-3.2-1B --quant q4 --calibrate wiki.train.raw ./Llama-3.2-1B-gptq
kuiper export -m model.gguf --quant none --dtype bfloat16 ./model
kuiper export -m ./llama-2-7b --quant q8 --format llama2c --version 2 llama2-7b.bin
"""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight", re.ASCII)
_KINDS = ("q", "k", "v", "o", "gate", "up", "down")


@with_option_groups
def export(
    model: ModelOptions,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The folder (safetensors) or file (gguf, llama2c) to write.",
            show_default=False,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            show_default=False,
            help="safetensors, gguf or llama2c. Default: by the name of OUT (.gguf, .bin), else safetensors.",
        ),
    ] = None,
    quant: Annotated[
        str,
        typer.Option(
            "--quant",
            metavar="QUANT",
            help="What matrices become: keep (what they are), none (floating point), q8, q4; in gguf also a "
            "type or mixture such as q4_k_m.",
        ),
    ] = "keep",
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="N",
            show_default=False,
            help="Weights that share a scale: 32, 64 or 128. Default: 64, and 32 for q4.",
        ),
    ] = None,
    zero_point: Annotated[
        bool, typer.Option("--zero-point", help="q4 with a zero point for each group (safetensors).")
    ] = False,
    version: Annotated[
        int | None,
        typer.Option(
            "--version",
            metavar="N",
            show_default=False,
            help="Of llama2c: 0 or 1 (float32), 2 (int8), 3 (KuiperLLama's int8). Default: 0, and 2 for q8.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Of matrices that are not quantized: auto (as in the source), float32, float16, bfloat16.",
        ),
    ] = "auto",
    search: Annotated[
        bool, typer.Option("--search", help="Look for the scales that leave the least squared error.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            show_default=False,
            help="Round with a text in mind, such as the model is for, so that results on it change little "
            "(GPTQ): some ten thousand words in UTF-8. Takes far longer.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            show_default=False,
            help="Threads of the CPU. Default: KUIPER_NUM_THREADS, else the physical cores.",
        ),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Write a model in another format, or with fewer bits to a weight.

    OUT appears when all of it is on the disk; whatever goes wrong before that, nothing of it stays.
    """
    import_engine()
    from kuiperllm.engine.export import export as run

    with Reporter() as reporter, stopped_by_signals():
        report = run(
            model.model,
            out,
            format=format,
            quant=quant,
            group_size=group_size,
            zero_point=zero_point,
            version=version,
            dtype=dtype,
            search=search,
            calibration=None if calibrate is None else read_file(calibrate),
            tokenizer=model.tokenizer,
            force=force,
            threads=threads,
            progress=reporter.advance,
        )
    if as_json:
        print_json(report.to_dict())
        return
    if any(tensor.squares for tensor in report.tensors):
        write(error_table(report) + "\n")
    print_table(_rows(report))


def _rows(report: ExportReport) -> list[tuple[str, object]]:
    from kuiperllm.core.memory import format_bytes

    before, after = report.source_bytes, report.out_bytes
    rows: list[tuple[str, object]] = [
        ("source", f"{report.source} ({report.source_format}), {format_bytes(before)}"),
        (
            "written",
            f"{report.out} ({report.format}), {format_bytes(after)}, {after / before:.2f} of the source",
        ),
        ("bits", f"{report.bits_per_weight:.2f} per weight"),
    ]
    if report.max_error:
        error = f"{100 * report.relative_error:.3f} % (root mean square), at most {report.max_error:.3g}"
        rows.append(("error", error))
    rows.append(("time", f"{report.seconds:.1f} s"))
    return rows + [("note" if i == 0 else "", note) for i, note in enumerate(report.notes)]


def error_table(report: ExportReport) -> str:
    """Relative error of each matrix in percent, a row for each layer; largest change and bits of the row."""
    rows = [["layer", *_KINDS, "max", "bits"]]
    layers: dict[str, dict[str, TensorReport]] = {}
    for tensor in report.matrices:
        match = _LAYER.fullmatch(tensor.name)
        row, kind = (match[1], match[2]) if match else (tensor.name.split(".")[-2], "")
        layers.setdefault(row, {})[kind] = tensor
    for name, found in layers.items():
        if name.isdigit():
            cells = [_percent([found[kind]]) if kind in found else "" for kind in _KINDS]
        else:
            cells = [_percent(found.values()), *[""] * (len(_KINDS) - 1)]
        rows.append([name, *cells, *_max_and_bits(list(found.values()))])
    of_kind = [[found[kind] for found in layers.values() if kind in found] for kind in _KINDS]
    rows.append(["all", *map(_percent, of_kind), *_max_and_bits(report.matrices)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "relative error in percent, largest change of a weight, bits per weight\n" + "".join(
        f"{line.rstrip()}\n" for line in lines
    )


def _percent(tensors: Iterable[TensorReport]) -> str:
    from kuiperllm.engine.export.report import relative_error

    changed = [tensor for tensor in tensors if tensor.squares]
    return f"{100 * relative_error(changed):.3f}" if changed else "-"


def _max_and_bits(tensors: list[TensorReport]) -> list[str]:
    weights = sum(8 * tensor.nbytes / tensor.bits_per_weight for tensor in tensors)
    bits = 8 * sum(tensor.nbytes for tensor in tensors) / weights
    return [f"{max(tensor.max_error for tensor in tensors):.3g}", f"{bits:.2f}"]
