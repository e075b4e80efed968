"""`AsyncLLM`: one engine for many coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from kuiperllm.config import SamplingParams
from kuiperllm.engine.engine_thread import EngineThread
from kuiperllm.engine.language_model import LanguageModel, Prompt
from kuiperllm.engine.loading import Progress
from kuiperllm.engine.mailbox import Mailbox
from kuiperllm.engine.output import Completion, Delta
from kuiperllm.engine.request import Guide, Request
from kuiperllm.engine.stats import EngineStats
from kuiperllm.errors import EngineStoppedError, QueueFullError, UsageError

__all__ = ["AsyncLLM", "Deltas"]


class AsyncLLM(LanguageModel):
    """A language model for asyncio: any number of requests at once, worked on together by one thread.

    To be used from one event loop, and to be shut down in the end.

    Args:
        model: as for `LLM`.
        tokenizer: as for `LLM`.
        progress: as for `LLM`.
        max_waiting: most outputs that may wait for their first turn; beyond, requests are refused; None: no
            limit.
        warm_up: prepare everything before the first request, see `Engine.warm_up`.
        options: as for `LLM`.

    Raises:
        KuiperError: as for `LLM`.

    Examples:
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
    ) -> None:
        super().__init__(model, tokenizer=tokenizer, progress=progress, reserve=True, options=options)
        if warm_up:
            self._engine.warm_up()
        self.max_waiting = max_waiting
        self._numbers = count()
        self._mailboxes: dict[str, Mailbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._takes_requests = True
        self._thread = EngineThread(self._engine, self._deliver, self._on_failure)

    # --- requests -----------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        make_guide: Callable[[], Guide] | None = None,
        cache_salt: str = "",
        streams: bool = True,
    ) -> Deltas:
        """Continue a prompt `params.n` times.

        The prompt is encoded and checked, and the request is queued, before this returns. With
        `streams=False`, or if `best_of` chooses, there is one delta for each output, its last.

        Args:
            prompt: a text or token ids, as for `LLM.generate`.
            params: how to choose tokens (default: `default_params`).
            request_id: names the request, for `abort` (default: one is made up).
            priority: lower goes first.
            make_guide: makes what restricts the tokens of an output.
            cache_salt: only requests of the same salt share cached prompts.
            streams: whether text is wanted as it is made.

        Raises:
            ContextLengthError: the prompt leaves no room for output.
            TokenizerError: the text cannot be encoded, or a token id is out of range.
            UsageError: the prompt is empty, or the id is in use.
            QueueFullError: `max_waiting` outputs wait already.
            EngineStoppedError: the engine was shut down, or has failed.
        """
        request = Request(
            request_id=self._new_id() if request_id is None else request_id,
            prompt_token_ids=self.token_ids(prompt),
            params=params or self.default_params,
            priority=priority,
            make_guide=make_guide,
            cache_salt=cache_salt,
            streams=streams,
        )
        return self._submit(request, request.params.n)

    async def complete(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]:
        """The `params.n` finished outputs, by index; arguments and exceptions as for `generate`."""
        return await _completions(self.generate(prompt, params, streams=False, **options))

    async def embed(self, prompt: Prompt, *, request_id: str | None = None, priority: int = 0) -> Completion:
        """The embedding of a text: `Completion.embedding`. Raises like `generate`."""
        request = Request(
            request_id=self._new_id() if request_id is None else request_id,
            prompt_token_ids=self.token_ids(prompt),
            params=SamplingParams(max_tokens=1),
            priority=priority,
            streams=False,
            embeds=True,
        )
        (completion,) = await _completions(self._submit(request, 1))
        return completion

    def abort(self, request_id: str) -> None:
        """Give a request up; it ends with completions whose `finish_reason` is `abort`.

        Unknown ids are ignored. May be called from any thread.
        """
        self._thread.abort(request_id)

    def _submit(self, request: Request, num_outputs: int) -> Deltas:
        self._loop = asyncio.get_running_loop()
        if self._thread.failure is not None:
            raise EngineStoppedError(f"the engine failed and has stopped: {self._thread.failure}")
        if not self._takes_requests:
            raise EngineStoppedError("the engine is shutting down and takes no more requests")
        if self.max_waiting is not None and self._num_waiting >= self.max_waiting:
            raise QueueFullError(f"{self._num_waiting} requests wait already; try again later")
        if request.request_id in self._mailboxes:
            raise UsageError(f"the request id {request.request_id!r} is in use; choose another one")
        self._engine.check(request)
        mailbox = self._mailboxes[request.request_id] = Mailbox(num_outputs)
        self._is_idle.clear()
        self._thread.add(request)
        return Deltas(self, request.request_id, mailbox)

    @property
    def _num_waiting(self) -> int:
        return self._thread.num_queued + self._engine.scheduler.num_waiting

    def _new_id(self) -> str:
        return f"request-{next(self._numbers)}"

    # --- how it is ----------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """The engine's counters and gauges; cheap, and safe to call at any time."""
        return self._engine.stats()

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine; None while it is well."""
        return self._thread.failure

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._takes_requests and self._thread.failure is None

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way.

        Returns:
            Whether all have ended within `timeout` seconds.
        """
        self._takes_requests = False
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout)
        return self._is_idle.is_set()

    async def shutdown(self) -> None:
        """Give up what is under way and end the thread; nothing is done if that was done before."""
        self._takes_requests = False
        self._thread.stop()
        await asyncio.to_thread(self._thread.join)
        self._fail_all(EngineStoppedError("the engine was shut down before the output was complete"))

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.shutdown()

    # --- what the thread tells ----------------------------------------------------------------------------

    def _deliver(self, deltas: list[Delta]) -> None:
        self._call(self._distribute, deltas)

    def _on_failure(self, error: EngineStoppedError) -> None:
        self._call(self._fail_all, error)

    def _call(self, function: Callable[[Any], None], argument: object) -> None:
        """Have something called in the event loop; if that is closed, nobody waits for anything any more."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            self._thread.stop()

    def _distribute(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox is not None:
                mailbox.put(delta)
                if mailbox.is_complete:
                    self._close(delta.request_id)

    def _fail_all(self, error: EngineStoppedError) -> None:
        for request_id, mailbox in list(self._mailboxes.items()):
            mailbox.fail(EngineStoppedError(str(error)))  # one each, since a traceback hangs on it
            self._close(request_id)

    def _close(self, request_id: str) -> None:
        del self._mailboxes[request_id]
        if not self._mailboxes:
            self._is_idle.set()


class Deltas:
    """The deltas of a request, as an asynchronous iterator.

    A reader that is slower than the engine gets fewer, longer deltas. The request is given up at once when
    the reading task is cancelled, when `aclose` is called, and when nothing refers to the iterator any more.

    Raises:
        EngineStoppedError: the engine failed, or was shut down, before the end.
        KuiperError: what else went wrong with this request.
    """

    def __init__(self, llm: AsyncLLM, request_id: str, mailbox: Mailbox) -> None:
        self.request_id = request_id
        self._llm = llm
        self._mailbox = mailbox

    def __aiter__(self) -> Deltas:
        return self

    async def __anext__(self) -> Delta:
        try:
            delta = await self._mailbox.take()
        except asyncio.CancelledError:
            self._give_up()
            raise
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """Give the request up, if it is still under way."""
        self._give_up()

    def __del__(self) -> None:
        self._give_up()

    def _give_up(self) -> None:
        if not self._mailbox.is_complete and not self._mailbox.is_abandoned:
            self._mailbox.is_abandoned = True
            self._llm.abort(self.request_id)


async def _completions(deltas: Deltas) -> list[Completion]:
    done = [delta.completion async for delta in deltas if delta.completion is not None]
    return sorted(done, key=lambda completion: completion.index)
