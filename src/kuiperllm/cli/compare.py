"""`kuiper compare`: how far the predictions of one model are from those of another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

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
from kuiperllm.cli.perplexity import described, figure, name_of, progress, speed, text_of
from kuiperllm.cli.progress import Reporter
from kuiperllm.cli.text_input import read_file
from kuiperllm.errors import UsageError

if TYPE_CHECKING:
    from kuiperllm.engine.comparison import Comparison

_PANEL = "How OTHER is loaded"

EXAMPLES = """\
kuiper compare -m model-f16.gguf model-q8_0.gguf wiki.test.raw
kuiper compare -m ./Llama-3.2-1B --other-quant q8 --chunks 20 wiki.test.raw
kuiper compare -m ./Qwen3-0.6B --dtype float32 --other-dtype bfloat16 --json wiki.test.raw
"""


def _option(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, rich_help_panel=_PANEL, show_default=False, help=help)


@dataclass(frozen=True, slots=True)
class OtherOptions:
    """Where loading the other model differs from loading the reference."""

    other_quant: Annotated[
        str | None, _option("QUANT", "As --quant, for OTHER. Default for all of these: as the reference.")
    ] = None
    other_group_size: Annotated[int | None, _option("N", "As --group-size, for OTHER.")] = None
    other_dtype: Annotated[str | None, _option("DTYPE", "As --dtype, for OTHER.")] = None
    other_device: Annotated[str | None, _option("DEVICE", "As --device, for OTHER.")] = None

    def over(self, engine: EngineOptions) -> EngineOptions:
        """The reference's options with these changes."""
        given: dict[str, Any] = {
            "quant": self.other_quant,
            "group_size": self.other_group_size,
            "dtype": self.other_dtype,
            "device": self.other_device,
        }
        return replace(engine, **{name: value for name, value in given.items() if value is not None})


@with_option_groups
def compare(
    model: ModelOptions,
    others: OtherOptions,
    text: TextOptions,
    engine: EngineOptions,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[OTHER] FILE",
            show_default=False,
            help="OTHER is a model, named like that of -m; without it, the model of -m is loaded a second "
            "time, as the --other options say. FILE is a text, in UTF-8; - reads standard input.",
        ),
    ],
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Measure how far a model's predictions are from those of a reference, the model of -m.

    Both read the same text. Reported are the Kullback-Leibler divergence of OTHER from the reference, how
    often both find the same token the most likely, the differences of logits, and the perplexities. The
    options are for both models; the --other options are for OTHER alone, so that a model can be compared
    with itself, loaded in another way.
    """
    if len(files) > 2:
        raise UsageError(f"give FILE, or OTHER and FILE; there is one too many: {files[2]!r}")
    *name, file = files
    text.check()
    other = replace(model, model=name[0]) if name else model
    other_engine = others.over(engine)
    engine.config()
    other_engine.config()
    if not name and other_engine == engine:
        raise UsageError(
            "nothing to compare with: name OTHER before FILE, or say with --other-quant or --other-dtype how "
            "else to load the model"
        )
    content = text.texts(read_file(file))
    with Reporter() as reporter:
        first = load(model, engine, reporter)
        second = load(other, other_engine, reporter)
        from kuiperllm.engine.comparison import compare

        result = compare(
            first,
            second,
            content,
            **text.as_arguments(),
            progress=progress(reporter, "comparing", "divergence {:.5f}"),
        )
    if as_json:
        found = result.to_dict()
        found["reference"] |= described(first, engine)
        found["other"] |= described(second, other_engine)
        print_json({"file": file, **found})
    else:
        names = [("reference", name_of(first)), ("other", name_of(second))]
        print_table([*names, ("text", text_of(file, result.reference)), *_rows(result)])


def _rows(result: Comparison) -> list[tuple[str, object]]:
    return [
        (
            "divergence",
            f"mean {result.kl_mean:.6f} ± {result.kl_standard_error:.6f} nats a token, median "
            f"{result.kl_median:.6f}, 99 % {result.kl_99:.6f}, largest {result.kl_max:.6f}",
        ),
        ("same top", f"{100 * result.same_top:.2f} % of tokens"),
        (
            "logits",
            f"largest difference {result.logit_difference_max:.4f}, root mean square "
            f"{result.logit_difference_rms:.5f}",
        ),
        ("perplexity", f"reference {figure(result.reference)}, other {figure(result.other)}"),
        ("", f"ratio {result.perplexity_ratio:.6g} ± {result.perplexity_ratio_standard_error:.2g}"),
        ("speed", f"reference {speed(result.reference)}"),
        ("", f"other {speed(result.other)}"),
    ]
