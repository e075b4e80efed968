"""`AsyncLLM`: one engine for many coroutines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any


from kuiperllm.config import SamplingParams
from kuiperllm.engine.loading import Progress
from kuiperllm.engine.output import Completion, Delta
from kuiperllm.engine.request import Guide
from kuiperllm.engine.stats import EngineStats


class AsyncLLM:
    """A language model for asyncio: any number of requests at once, worked on together by one thread.

    Has `tokenizer`, `config`, `max_model_len`, `default_params`, `token_ids` and `apply_chat_template` as
    `LLM` has. To be used from one event loop.

    Args:
        model, tokenizer, progress, options: as for `LLM`.
        max_waiting: most requests that may wait for their first turn; beyond, `generate` raises; None: no end.
        warm_up: prepare everything before the first request, see `Engine.warm_up`.

    Raises:
        KuiperError: as `LLM`.

    Example:
        >>> async with AsyncLLM() as llm:
        ...     async for delta in llm.generate("ROMEO:", SamplingParams(max_tokens=40)):
        ...         print(delta.text, end="")
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        progress: Progress | None = None,
        max_waiting: int | None = None,
        warm_up: bool = True,
        **options: Any,
    ) -> None: ...

    def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        make_guide: Callable[[], Guide] | None = None,
        cache_salt: str = "",
        streams: bool = True,
    ) -> AsyncGenerator[Delta, None]:
        """Continue a prompt `params.n` times; deltas of all outputs as they come.

        A reader that is slower than the engine gets fewer, longer deltas. Closing the generator, or
        cancelling the task that reads it, gives the request up at once. With `streams=False`, or if `best_of`
        chooses, there is one delta for each output, its last. The prompt is encoded and checked, and the
        request is queued, when this is called, not with the first `anext`.

        Raises:
            ContextLengthError: the prompt leaves no room for output, or never fits into the cache.
            TokenizerError: the text cannot be encoded, or a token id is out of range.
            UsageError: the prompt is empty, or the id is in use.
            QueueFullError: `max_waiting` requests wait already.
            EngineStoppedError: the engine was shut down, or failed, before or meanwhile.
            KuiperError: what else went wrong with this request.
        """

    async def complete(
        self, prompt: str | list[int], params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]:
        """The `params.n` finished outputs, by index; arguments and exceptions as for `generate`."""

    async def embed(self, prompt: str | list[int], *, request_id: str | None = None) -> Completion:
        """The embedding of a text: the model's normalized last hidden state. Raises like `generate`."""

    def abort(self, request_id: str) -> None:
        """Give a request up; its generator ends with completions whose `finish_reason` is `abort`."""

    def stats(self) -> EngineStats:
        """The engine's counters and gauges; cheap, and safe to call at any time."""

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine; None while it is well."""

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; whether all ended within `timeout` seconds."""

    async def shutdown(self) -> None:
        """Give up what is under way, end the thread, give the memory back. Safe to call twice."""

    async def __aenter__(self) -> AsyncLLM: ...

    async def __aexit__(self, *exc: object) -> None: ...
