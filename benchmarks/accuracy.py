"""What each format of weights costs in accuracy: perplexity, and divergence from the same model in float32.

    python benchmarks/accuracy.py demo=demo=input.txt NAME=MODEL.gguf=stories.txt --page docs/accuracy.md

Each argument is what to call a model, the model, and a text. `demo` is the model in the package; of its
training text (see tools/train_demo.py) only the last 5 % are used, which training never saw. A text that
holds the separator is several texts, each scored whole; another is cut into windows.

The reference is the model in float32. Of a GGUF file, a float32 copy is written first, and from that copy
files of all types that the `gguf` package can write and KuiperLLM can read. Files of other types, made
elsewhere, come with `--file NAME=PATH`. What `--quant` makes while loading is measured too. A variant that
cannot be run is named and left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from kuiperllm import LLM, Device, KuiperError, compare
from kuiperllm.config import QUANTS
from kuiperllm.quant.ggml import formats
from machine import write_results

ROOT = Path(__file__).resolve().parents[1]
GROUP_SIZES = (128, 64, 32)
MARKED = re.compile(r"(<!-- accuracy:begin -->\n).*?(<!-- accuracy:end -->)", re.DOTALL)
COLUMNS = (
    "model", "weights", "size, MiB", "perplexity", "by that of float32", "mean divergence", "99 %",
    "same top token", "RMS of logits' differences",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to hold the weights of a model."""

    name: str
    model: Path
    options: dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", metavar="NAME=MODEL=TEXT")
    parser.add_argument(
        "--file", action="append", default=[], metavar="NAME=PATH", help="another variant of a model"
    )
    parser.add_argument("--only", help="names of variants, such as 'q8 128,Q4_0'; default: all")
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", type=Path, default=ROOT / "scratch" / "accuracy")
    parser.add_argument("--out", type=Path, help="where the results go (default: benchmarks/results/)")
    parser.add_argument("--page", type=Path, help="write the table into this page, between its marks")
    options = parser.parse_args(arguments)
    extra = [pair.partition("=") for pair in options.file]
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        name, model, text = case.split("=", 2)
        more = [Path(path) for of, _, path in extra if of == name]
        rows += measure(name, model, Path(text), more, options)
    print(table(rows))
    kind = "cpu" if options.device == "cpu" else "gpu"
    out = options.out or ROOT / "benchmarks" / "results" / f"{date.today()}-{kind}-accuracy.json"
    write_results(out, Device(options.device), rows)
    if options.page is not None:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(MARKED.sub(rf"\1{table(rows)}\n\2", page), encoding="utf-8")


def measure(
    name: str, model: str, text: Path, more: list[Path], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each variant of a model, the reference first."""
    content = content_of(model, text, options.separator)
    how = {"device": options.device, "max_model_len": options.max_model_len}
    first, *variants = variants_of(name, model, more, options.scratch)
    reference = LLM(first.model, **how, **first.options)
    alone = reference.perplexity(content).to_dict()
    rows = [facts(name, first, reference, text) | {"perplexity": alone}]
    wanted = None if options.only is None else options.only.split(",")
    for variant in variants:
        if wanted is not None and variant.name not in wanted:
            continue
        try:
            llm = LLM(variant.model, **how, **variant.options)
            found = compare(reference, llm, content).to_dict()
        except KuiperError as error:
            print(f"{name} {variant.name} is left out: {error}", file=sys.stderr)
            continue
        del found["reference"]
        rows.append(facts(name, variant, llm, text) | {"perplexity": found.pop("other")} | found)
        print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def content_of(model: str, path: Path, separator: str) -> str | list[str]:
    text = path.read_text(encoding="utf-8")
    if model == "demo":
        sys.path.insert(0, str(ROOT / "tools"))
        from train_demo import split_corpus

        text = split_corpus(text)[1]
    if separator in text:
        return [part.strip() for part in text.split(separator) if part.strip()]
    return text


def variants_of(name: str, model: str, more: list[Path], scratch: Path) -> Iterator[Variant]:
    """The reference, then all others."""
    source = Path(str(files("kuiperllm") / "data" / "demo.gguf")) if model == "demo" else Path(model)
    is_gguf = source.is_file() and source.read_bytes()[:4] == b"GGUF"
    whole = rewrite(source, "F32", scratch / f"{name}-F32.gguf") if is_gguf else source
    yield Variant("float32", whole, {"dtype": "float32"})
    yield Variant("float16", whole, {"dtype": "float16"})
    yield Variant("bfloat16", whole, {"dtype": "bfloat16"})
    for quant in QUANTS:
        if quant != "none":
            for group_size in GROUP_SIZES:
                yield Variant(f"{quant} {group_size}", whole, {"quant": quant, "group_size": group_size})
    if is_gguf:
        for kind in writable_types():
            yield Variant(kind, rewrite(whole, kind, scratch / f"{name}-{kind}.gguf"), {})
    for path in more:
        yield Variant(path.stem, path, {})


def writable_types() -> list[str]:
    """GGUF's quantized types that are read here and written there, the largest first."""
    import gguf
    import numpy as np

    found = []
    for known in sorted(formats().values(), key=lambda known: -known.block_bytes / known.block_size):
        if known.block_size > 1:
            try:
                gguf.quantize(np.zeros((1, 256), np.float32), gguf.GGMLQuantizationType[known.name])
            except NotImplementedError:
                continue
            found.append(known.name)
    return found


def rewrite(source: Path, kind: str, target: Path) -> Path:
    """A GGUF file with all matrices in another type; those whose rows its blocks do not divide in float32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    wanted = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2 or values.shape[-1] % block or wanted == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def facts(name: str, variant: Variant, llm: LLM, text: Path) -> dict[str, Any]:
    decoder = llm.loaded.decoder
    return {
        "model": name,
        "weights": variant.name,
        "text": text.name,
        "weight_bytes": decoder.weight_bytes,
        "kv_cache": str(llm.loaded.kv_dtype),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, in Markdown."""
    head = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    return "\n".join([*head, *map(line, rows)])


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    measured = row["perplexity"]
    cells = [
        row["model"],
        row["weights"],
        f"{row['weight_bytes'] / 2**20:.2f}",
        shown(measured["perplexity"]),
    ]
    if "kl_mean" in row:
        cells += [
            f"{shown(row['perplexity_ratio'])} ± {row['perplexity_ratio_standard_error']:.4f}",
            f"{row['kl_mean']:.6f}",
            f"{row['kl_99']:.5f}",
            f"{100 * row['same_top']:.2f} %",
            f"{row['logit_difference_rms']:.4f}",
        ]
    return "| " + " | ".join(cells + [""] * (len(COLUMNS) - len(cells))) + " |"


def shown(value: float | None) -> str:
    if value is None:
        return "infinite"
    return f"{value:.4f}" if value < 1e5 else f"{value:.1e}"


if __name__ == "__main__":
    main()
