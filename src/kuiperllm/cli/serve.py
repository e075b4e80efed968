"""`kuiper serve`: OpenAI's API and a chat page."""

from __future__ import annotations

import logging
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kuiperllm.cli.interrupts import import_engine, postponed
from kuiperllm.cli.model import reported_name
from kuiperllm.cli.options import (
    EngineOptions,
    ModelOptions,
    Verbose,
    option,
    with_option_groups,
)
from kuiperllm.cli.progress import Reporter
from kuiperllm.config import EngineConfig, settings
from kuiperllm.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from kuiperllm.server.config import ServerConfig

EXAMPLES = """\
kuiper serve -m Qwen/Qwen3-0.6B
kuiper serve -m ./Llama-3.2-1B-Instruct --quant q8 --host 0.0.0.0 --port 8080 --api-key secret
kuiper serve -m model.gguf --max-num-seqs 32 --max-model-len 8192 --log-format json
"""

log = logging.getLogger("kuiperllm.server")

_BATCH = "Batching"
_NETWORK = "Network"
_API = "API"


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How requests are put together."""

    max_num_seqs: Annotated[
        int | None,
        option(_BATCH, "N", "Most outputs that are worked on at once. Default: 8 on a CPU, 256 on a GPU."),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        option(
            _BATCH, "N", "Most tokens that one pass takes in. Default: 512 on a CPU, 2048 or 8192 on a GPU."
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str, option(_BATCH, "DTYPE", "Type of keys and values: auto, float32, float16 or bfloat16.")
    ] = "auto"
    no_prefix_caching: Annotated[
        bool,
        option(_BATCH, None, "Compute prompts anew that begin like earlier ones.", "--no-prefix-caching"),
    ] = False
    max_waiting: Annotated[
        int, option(_BATCH, "N", "Most requests that may wait; further ones are answered 503. Default: 1024.")
    ] = 1024


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Where and to whom answers are given."""

    host: Annotated[
        str,
        option(
            _NETWORK, "HOST", "Address to listen at; 0.0.0.0 is all of this machine's. Default: 127.0.0.1."
        ),
    ] = "127.0.0.1"
    port: Annotated[int, option(_NETWORK, "PORT", "Port to listen at; 0 is any. Default: 8000.")] = 8000
    api_key: Annotated[
        list[str] | None,
        option(
            _NETWORK,
            "KEY",
            "Ask for this key; may be given several times. Default: those in KUIPER_API_KEY, with commas "
            "between them; without any, no key is asked for.",
        ),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        option(
            _NETWORK, "ORIGIN", "Let web pages of this origin call the API (CORS); * is any. May be repeated."
        ),
    ] = None
    tls_certificate: Annotated[
        Path | None, option(_NETWORK, "FILE", "PEM file of a certificate: encrypt connections.")
    ] = None
    tls_key: Annotated[Path | None, option(_NETWORK, "FILE", "PEM file of the certificate's key.")] = None
    max_connections: Annotated[int, option(_NETWORK, "N", "Most open connections. Default: 4096.")] = 4096
    max_body_mib: Annotated[int, option(_NETWORK, "N", "Largest body of a request, in MiB. Default: 16.")] = (
        16
    )
    drain_timeout: Annotated[
        float, option(_NETWORK, "S", "After a signal, requests under way have S seconds to end. Default: 30.")
    ] = 30.0
    log_format: Annotated[str, option(_NETWORK, "FORMAT", "Of the log on stderr: text or json.")] = "text"


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """What the API looks like."""

    served_name: Annotated[
        list[str] | None,
        option(_API, "NAME", "What requests call the model; may be repeated. Default: as it is given to -m."),
    ] = None
    chat_template: Annotated[
        Path | None, option(_API, "FILE", "A Jinja file in the place of the model's chat template.")
    ] = None
    tool_format: Annotated[
        str,
        option(
            _API,
            "FORMAT",
            "How the model writes calls: auto (by its template), hermes (also Qwen), llama3, none.",
        ),
    ] = "auto"
    reasoning_format: Annotated[
        str,
        option(
            _API, "FORMAT", "Tell <think>...</think> from the answer: auto (by the template), think, none."
        ),
    ] = "auto"
    no_page: Annotated[bool, option(_API, None, "No chat page at /.", "--no-page")] = False


@with_option_groups
def serve(
    model: ModelOptions,
    engine: EngineOptions,
    batch: BatchOptions,
    network: NetworkOptions,
    api: ApiOptions,
    verbose: Verbose = 0,
) -> None:
    """Answer requests of OpenAI's API, and show a chat page. Ctrl-C ends what is under way, then stops."""
    options = engine.as_fields() | _batch_fields(batch)
    EngineConfig(**options)  # refuses impossible values before anything heavy is imported
    config = _server_config(model, network, api)
    import_engine()
    from kuiperllm.engine.async_llm import AsyncLLM
    from kuiperllm.server.logs import set_up
    from kuiperllm.server.run import listen
    from kuiperllm.server.run import serve as serve_until_stopped

    with closing(listen(config)) as listener, Reporter() as reporter:
        llm = AsyncLLM(
            model.model,
            tokenizer=model.tokenizer,
            progress=reporter.advance,
            max_waiting=batch.max_waiting,
            **options,
        )
        reporter.clear()
        set_up(network.log_format, verbose)
        tell = log.info if network.log_format == "json" else _tell
        tell(str(llm.loaded.plan))
        serve_until_stopped(
            llm, config, lambda address: tell(f"serving at {address} (Ctrl-C stops)"), listener
        )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _batch_fields(batch: BatchOptions) -> dict[str, Any]:
    found: dict[str, Any] = {
        "max_num_seqs": batch.max_num_seqs,
        "max_num_batched_tokens": batch.max_num_batched_tokens,
        "kv_cache_dtype": batch.kv_cache_dtype,
        "prefix_caching": not batch.no_prefix_caching,
    }
    return {name: value for name, value in found.items() if value is not None}


def _server_config(model: ModelOptions, network: NetworkOptions, api: ApiOptions) -> ServerConfig:
    """What the options say about the server.

    Raises:
        UsageError: a value is not possible.
        UnsupportedError: the packages that serving needs are not installed.
    """
    try:
        with postponed():
            import fastapi  # noqa: F401
            import llguidance  # noqa: F401
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"serving needs the package {error.name}: pip install 'kuiperllm[server]'"
        ) from None
    from kuiperllm.server.config import ServerConfig

    return ServerConfig(
        host=network.host,
        port=network.port,
        model_names=tuple(api.served_name or (reported_name(model),)),
        api_keys=tuple(network.api_key or settings().api_keys),
        allowed_origins=tuple(network.allow_origin or ()),
        max_connections=network.max_connections,
        max_body_bytes=network.max_body_mib << 20,
        drain_timeout_s=network.drain_timeout,
        chat_template=None if api.chat_template is None else _template(api.chat_template),
        tool_format=api.tool_format,
        reasoning_format=api.reasoning_format,
        page=not api.no_page,
        log_format=network.log_format,
        tls_certificate=network.tls_certificate,
        tls_key=network.tls_key,
    )


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None
