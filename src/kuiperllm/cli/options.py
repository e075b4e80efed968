"""The options that commands share, each declared once.

A group of options is a dataclass whose fields are annotated as Typer's parameters are. A command that takes
such a group as an argument and is wrapped in `with_option_groups` gets an option for each of its fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeGuard, TypeVar, get_type_hints

import typer

from kuiperllm.cli.output import set_verbosity
from kuiperllm.config import EngineConfig, SamplingParams
from kuiperllm.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., None])

_MODEL = "Model"
_SAMPLING = "Sampling"
_ENGINE = "Engine"
_TEXT = "Text"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Verbose = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        callback=set_verbosity,
        metavar="",
        show_default=False,
        help="Tell what is done, on stderr; -vv tells more.",
    ),
]


def option(panel: str, metavar: str | None, help: str, *names: str) -> Any:
    """An option of one of the groups in which `--help` shows them."""
    return typer.Option(*names, metavar=metavar, rich_help_panel=panel, show_default=False, help=help)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model."""

    model: Annotated[
        str | None,
        option(
            _MODEL,
            "MODEL",
            "A folder, a file, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct. Default: the demo model "
            "that comes with kuiperllm.",
            "-m",
            "--model",
        ),
    ] = None
    tokenizer: Annotated[
        str | None, option(_MODEL, "PATH", "A tokenizer's file or folder. Default: the model's own.")
    ] = None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the model is run."""

    device: Annotated[
        str, option(_ENGINE, "DEVICE", "auto, cpu or cuda:N; auto takes a GPU if there is one.")
    ] = "auto"
    dtype: Annotated[
        str,
        option(
            _ENGINE,
            "DTYPE",
            "Data type of weights in memory: auto (as in the checkpoint), float32, float16, bfloat16.",
        ),
    ] = "auto"
    quant: Annotated[
        str,
        option(
            _ENGINE, "QUANT", "Quantize linear layers while loading: none, q8 or q4 (int8 or int4 groups)."
        ),
    ] = "none"
    group_size: Annotated[int, option(_ENGINE, "N", "Weights that share a scale: 32, 64 or 128.")] = 64
    max_model_len: Annotated[
        int | None,
        option(_ENGINE, "N", "Longest prompt plus output, in tokens. Default: what model and memory allow."),
    ] = None
    threads: Annotated[
        int | None,
        option(_ENGINE, "N", "Threads of the CPU. Default: KUIPER_NUM_THREADS, else the physical cores."),
    ] = None

    def as_fields(self) -> dict[str, Any]:
        """Keyword arguments of `EngineConfig` and `LLM`."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "quant": self.quant,
            "group_size": self.group_size,
            "max_model_len": self.max_model_len,
            "num_threads": self.threads,
        }

    def config(self) -> EngineConfig:
        """The engine's configuration.

        Raises:
            UsageError: a value is unknown or out of range.
        """
        return EngineConfig(**self.as_fields())


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen. What is not given is as the checkpoint recommends."""

    temperature: Annotated[
        float | None,
        option(
            _SAMPLING, "T", "0 takes the most likely token. Default: what the checkpoint recommends, else 1."
        ),
    ] = None
    top_k: Annotated[int | None, option(_SAMPLING, "K", "Keep the K most likely tokens; 0 keeps all.")] = None
    top_p: Annotated[
        float | None, option(_SAMPLING, "P", "Keep the most likely tokens whose probabilities sum to P.")
    ] = None
    min_p: Annotated[
        float | None, option(_SAMPLING, "P", "Drop tokens less likely than P times the most likely one.")
    ] = None
    repetition_penalty: Annotated[
        float | None, option(_SAMPLING, "R", "Above 1: make tokens of prompt and output less likely.")
    ] = None
    presence_penalty: Annotated[
        float | None, option(_SAMPLING, "R", "-2 to 2, subtracted from the logits of tokens in the output.")
    ] = None
    frequency_penalty: Annotated[
        float | None,
        option(_SAMPLING, "R", "-2 to 2, subtracted for each time that the token is in the output."),
    ] = None
    seed: Annotated[
        int | None,
        option(_SAMPLING, "N", "The same seed gives the same text. Default: a new one each time."),
    ] = None
    max_tokens: Annotated[
        int | None,
        option(
            _SAMPLING, "N", "Most tokens to make. Default: 256 for generate; for chat, until the model stops."
        ),
    ] = None
    min_tokens: Annotated[int | None, option(_SAMPLING, "N", "Do not stop before N tokens.")] = None
    stop: Annotated[
        list[str] | None,
        option(_SAMPLING, "TEXT", "End the output before this text; may be given several times."),
    ] = None
    ignore_eos: Annotated[
        bool, option(_SAMPLING, None, "Go on after the model's end-of-text token.", "--ignore-eos")
    ] = False

    def params(self, defaults: SamplingParams, **fallbacks: Any) -> SamplingParams:
        """What was given, over `fallbacks`, over `defaults`.

        Raises:
            SamplingError: a value is out of its range.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return defaults.with_changes(**fallbacks | {k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a text that is scored is cut."""

    context: Annotated[
        int | None,
        option(
            _TEXT,
            "N",
            "Tokens in a window. Each begins anew, and its second half is scored. Default: 512, or what the "
            "model allows.",
        ),
    ] = None
    stride: Annotated[
        int | None,
        option(
            _TEXT,
            "N",
            "Windows begin every N tokens instead, are N / 2 tokens longer, and their last N tokens are "
            "scored.",
        ),
    ] = None
    chunks: Annotated[int | None, option(_TEXT, "N", "Score the first N windows only.")] = None
    separator: Annotated[
        str | None,
        option(
            _TEXT,
            "TEXT",
            "The file holds several texts with this between them: score each of them whole, from its "
            "beginning.",
        ),
    ] = None

    def texts(self, text: str) -> str | list[str]:
        """One long text, or with `--separator` the texts in it, without blanks around them."""
        if self.separator is None:
            return text
        return [part.strip() for part in text.split(self.separator) if part.strip()]

    def as_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `LLM.perplexity` and `compare`."""
        return {"context": self.context, "stride": self.stride, "max_windows": self.chunks}

    def check(self) -> None:
        """Refuse what makes no sense, before a model is loaded.

        Raises:
            UsageError: a number is not possible, or options contradict each other.
        """
        if self.separator == "":
            raise UsageError("--separator must not be empty")
        if self.separator is not None and (self.context is not None or self.stride is not None):
            raise UsageError("--separator scores whole texts; --context and --stride do not go with it")
        from kuiperllm.engine.windows import MIN_CONTEXT

        least = {"--context": MIN_CONTEXT, "--stride": 1, "--chunks": 1}
        for (name, bound), value in zip(least.items(), (self.context, self.stride, self.chunks), strict=True):
            if value is not None and value < bound:
                raise UsageError(f"{name} must be at least {bound}, not {value}")


def with_option_groups(command: Command) -> Command:
    """Let a command take groups of options: each of their fields becomes an option of its own."""
    signature = inspect.signature(command, eval_str=True)
    groups = {p.name: p.annotation for p in signature.parameters.values() if _is_group(p.annotation)}
    plain = [p for p in signature.parameters.values() if p.name not in groups]
    options = [option for group in groups.values() for option in _options(group)]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*plain, *options)]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapper.__wrapped__
    return wrapper  # type: ignore[return-value]


def _is_group(annotation: object) -> TypeGuard[type[Any]]:
    return isinstance(annotation, type) and is_dataclass(annotation)


def _options(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    for field in fields(group):
        (option,) = hints[field.name].__metadata__
        if option.metavar and not option.param_decls:  # some versions of Typer take the metavar for the name
            option.param_decls = (f"--{field.name.replace('_', '-')}",)
    return [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]
