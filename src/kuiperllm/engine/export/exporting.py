"""Writing a model in another format, or with fewer bits to a weight."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from kuiperllm.backends.cpu.features import physical_cores
from kuiperllm.checkpoint import Checkpoint, Progress
from kuiperllm.checkpoint.writing.convert import Converter, TensorReport
from kuiperllm.checkpoint.writing.layout import ExportLayout, write
from kuiperllm.checkpoint.writing.output import Output
from kuiperllm.config import settings
from kuiperllm.core import Device
from kuiperllm.engine.export.calibration import Calibrated, calibration_windows
from kuiperllm.engine.export.documents import generation_config
from kuiperllm.engine.export.options import KEEP, NONE, ExportOptions
from kuiperllm.engine.export.plan import Shapes, plan_gguf, plan_llama2c, plan_safetensors
from kuiperllm.engine.export.report import ExportReport
from kuiperllm.engine.export.tokenizers import SourceTokenizer
from kuiperllm.engine.loading import DEMO, open_model
from kuiperllm.errors import UnsupportedError, UsageError
from kuiperllm.models import model_tensors
from kuiperllm.quant import Scheme
from kuiperllm.quant.recoding import can_recode
from kuiperllm.quant.rounding import quantize
from kuiperllm.text import Tokenizer

_FLOATS = ("FLOAT32", "FLOAT16", "BFLOAT16", "F32", "F16", "BF16")


def export(
    model: str | Path | None,
    out: str | Path,
    *,
    format: str | None = None,
    quant: str = "keep",
    group_size: int | None = None,
    zero_point: bool = False,
    version: int | None = None,
    dtype: str = "auto",
    search: bool = False,
    calibration: str | None = None,
    tokenizer: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model in another format, or with fewer bits to a weight.

    Tensors are read, rounded and written some rows at a time, so memory holds some megabytes of them. `out`
    appears when everything is on the disk; whatever goes wrong before, nothing of it stays.

    Args:
        model: a path, a hub id, or None for the model that comes with the package.
        out: the folder (safetensors) or file (gguf, llama2c) to write.
        format: `safetensors`, `gguf` or `llama2c`; by default what the name of `out` suggests.
        quant: what matrices become. `keep`: what they are in the source; `none`: floating-point numbers;
            `q8` or `q4`: groups of int8 or int4 (in GGUF: Q8_0, Q4_0); in GGUF also the name of any of its
            types or mixtures, such as `q4_k_m`. Codes that the source has already are kept wherever the
            scheme is the same.
        group_size: weights that share a scale, for q8 and q4: 32, 64 or 128 (by default 64, for q4 32);
            llama2c takes any that divides what it has to.
        zero_point: q4 with a zero point for each group.
        version: of llama2c: 0 or 1 (float32), 2 (int8), 3 (KuiperLLama's int8).
        dtype: of matrices that are not quantized: `auto` as in the source, `float32`, `float16`, `bfloat16`.
        search: look for the scales that leave the least squared error.
        calibration: a text like those that the model is for: matrices of layers are rounded so that their
            products on it change little (GPTQ), and all others as with `search`.
        tokenizer: a tokenizer's file or folder; by default the model's own.
        force: replace what exists.
        threads: of the CPU; by default `KUIPER_NUM_THREADS`, else the physical cores.
        progress: told of it as (what is being done, bytes done, bytes in all).

    Raises:
        UsageError: an option is unknown or contradicts another, or `out` exists already.
        UnsupportedError: the format cannot hold the model.
        CheckpointError: the source is damaged, or a weight is NaN or infinite.
        ExportError: the disk is full, or `out` cannot be written.
    """
    out = Path(out)
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"threads must be 1 to 1024, not {threads}")
    options = ExportOptions.of(
        out,
        format,
        version,
        quant=quant,
        group_size=group_size,
        zero_point=zero_point,
        dtype=dtype,
        search=search,
        calibrates=calibration is not None,
    )
    with open_model(model, progress) as checkpoint:
        return export_checkpoint(
            checkpoint,
            out,
            options,
            name=DEMO
            if model is None
            else Path(model).resolve().stem
            if Path(model).exists()
            else str(model),
            calibration=calibration,
            tokenizer=tokenizer,
            force=force,
            threads=threads,
            progress=progress,
        )


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    options: ExportOptions,
    *,
    name: str,
    calibration: str | None = None,
    tokenizer: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Like `export`, of a checkpoint that is open."""
    started = time.perf_counter()
    shapes = model_tensors(checkpoint.config, checkpoint, Device("cpu"))
    refuse_source(checkpoint, out)
    of_source = SourceTokenizer(checkpoint, tokenizer)
    layout = _plan(checkpoint, shapes, options, of_source, name)
    if not layout.is_folder:
        needed = _not_there_yet(layout.documents, of_source, out.parent)
        layout = replace(layout, documents=needed)
    output = Output(out, is_folder=layout.is_folder, replace=force, beside=layout.documents)
    output.require_space(layout.nbytes)
    rounding = (
        _refuse_to_round
        if options.quant == KEEP
        else partial(quantize, search=options.search or options.calibrates)
    )
    workers = threads or settings().num_threads or physical_cores()
    tell = None if progress is None else partial(progress, f"writing {out.name}")
    rounded = None
    if calibration is not None:
        rounded = _calibrated(checkpoint, layout, of_source.require("calibrating"), calibration, progress)
    with output, Converter(checkpoint, rounding, workers) as converter:
        write(layout, output, converter, rounded=rounded, progress=tell)
        output.commit()
    return ExportReport(
        source=str(checkpoint.path),
        source_format=checkpoint.format,
        out=str(out),
        format=options.format,
        quant=options.quant,
        source_bytes=sum(checkpoint.tensors[tensor].nbytes for tensor in shapes),
        out_bytes=output.bytes_written,
        seconds=time.perf_counter() - started,
        tensors=tuple(converter.reports),
        notes=(*of_source.notes, *_not_quantized(options, converter.reports)),
    )


def _calibrated(
    checkpoint: Checkpoint,
    layout: ExportLayout,
    tokenizer: Tokenizer,
    text: str,
    progress: Progress | None,
) -> Calibrated:
    """What rounds the matrices of a layout with a text in mind; those whose codes are kept are left out."""
    schemes = {}
    for section in layout.sections:
        kind, source = section.storage.kind, checkpoint.tensors[section.name].scheme
        if isinstance(kind, Scheme) and not (source is not None and can_recode(source, kind)):
            schemes[section.name] = kind
    windows = calibration_windows(text, tokenizer, checkpoint.config)
    tell = None if progress is None else partial(progress, "calibrating")
    return Calibrated(checkpoint, windows, schemes, tell)


def _not_there_yet(
    documents: Mapping[str, bytes], tokenizer: SourceTokenizer, folder: Path
) -> dict[str, bytes]:
    """The files beside a main file that have to be written: not the source's own, nor equal ones."""

    def is_there(path: Path, data: bytes) -> bool:
        return path.is_file() and (tokenizer.is_at(path) or path.read_bytes() == data)

    return {name: data for name, data in documents.items() if not is_there(folder / name, data)}


def _refuse_to_round(matrix: object, scheme: Scheme) -> NoReturn:
    raise UnsupportedError(
        f"its codes cannot be kept as {scheme}: columns are stored in another order, or a scale is out of "
        "range; choose --quant none, q8 or q4"
    )


def _not_quantized(options: ExportOptions, tensors: Sequence[TensorReport]) -> Iterator[str]:
    """A note on matrices that stayed floating-point because of their shape."""
    left = [t for t in tensors if len(t.shape) == 2 and t.stored.upper() in _FLOATS]
    if options.quant in (KEEP, NONE) or not left or options.format == "llama2c":
        return
    columns = ", ".join(str(n) for n in sorted({tensor.shape[1] for tensor in left}))
    yield (
        f"{len(left)} of {sum(len(t.shape) == 2 for t in tensors)} matrices stayed floating-point: groups do "
        f"not divide their rows of {columns} weights"
    )


def refuse_source(checkpoint: Checkpoint, out: Path) -> None:
    """Refuse an output that is the source, a part of it, or a folder around it.

    Raises:
        UsageError: it is.
    """
    source = Path(os.path.realpath(checkpoint.path))
    target = Path(os.path.realpath(out))
    is_folder = source.is_dir()
    folder = source if is_folder else source.parent
    whole_folder = is_folder or checkpoint.format == "safetensors"
    same = target == source or (out.exists() and source.exists() and os.path.samefile(out, source))
    around = target == folder or target in folder.parents
    inside = whole_folder and target.parent == folder and out.exists()
    if same or around or inside:
        raise UsageError(f"{out}: is the source or a part of it; export to another place")


def _plan(
    checkpoint: Checkpoint, shapes: Shapes, options: ExportOptions, tokenizer: SourceTokenizer, name: str
) -> ExportLayout:
    if options.format == "safetensors":
        documents = generation_config(checkpoint) | tokenizer.files()
        return plan_safetensors(checkpoint, shapes, options, documents)
    if options.format == "gguf":
        return plan_gguf(checkpoint, shapes, options, tokenizer.gguf_keys(), name)
    return plan_llama2c(checkpoint, shapes, options).with_documents(tokenizer.llama2c_files())
