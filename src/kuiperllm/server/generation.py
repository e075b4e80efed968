"""Runs the prompts of one request on the engine: all deltas as they come, and nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kuiperllm.config import SamplingParams
from kuiperllm.engine.output import Completion, Delta
from kuiperllm.engine.request import Guide
from kuiperllm.errors import EngineStoppedError

if TYPE_CHECKING:
    from kuiperllm.engine.async_llm import AsyncLLM, Deltas
    from kuiperllm.server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of a request."""

    prompt_ids: list[int]
    params: SamplingParams
    make_guide: Callable[[], Guide] | None = None
    priority: int = 0
    cache_salt: str = ""
    streams: bool = True


class Generation:
    """The jobs of one request, all of them queued when this is made.

    Must be closed, whatever happens; that gives up what has not ended.

    Args:
        llm: does the work.
        jobs: one or more.
        request_id: names the request, in the log and in answers; any number of requests may have the same.
        metrics: told of tokens and ends.

    Raises:
        KuiperError: see `AsyncLLM.generate`. None of the jobs is left in the queue then.
    """

    def __init__(self, llm: AsyncLLM, jobs: list[Job], request_id: str, metrics: Metrics) -> None:
        self._llm = llm
        self._jobs = jobs
        self._metrics = metrics
        self._last: dict[tuple[int, int], float] = {}
        self._left = [job.params.n for job in jobs]
        self._names: list[str] = []
        self._streams: list[Deltas] = []
        try:
            for number, job in enumerate(jobs):
                name = f"{request_id}-{number}-{id(self):x}"
                stream = llm.generate(
                    job.prompt_ids,
                    job.params,
                    request_id=name,
                    priority=job.priority,
                    make_guide=job.make_guide,
                    cache_salt=job.cache_salt,
                    streams=job.streams,
                )
                self._names.append(name)
                self._streams.append(stream)
        except BaseException:
            self._abort()
            raise

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(job.prompt_ids) for job in self._jobs)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(number of the job, delta) as they come, to the end of all outputs.

        Raises:
            KuiperError: a job failed; the others are lost too.
        """
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                self._note(0, delta)
                yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(len(self._streams))
        tasks = [
            asyncio.create_task(_forward(number, stream, queue))
            for number, stream in enumerate(self._streams)
        ]
        try:
            running = len(tasks)
            while running:
                number, found = await queue.get()
                if found is None:
                    running -= 1
                elif isinstance(found, BaseException):
                    raise found
                else:
                    self._note(number, found)
                    yield number, found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def completions(self) -> list[list[Completion]]:
        """The outputs of each job by index, once all have ended. Raises like `deltas`."""
        found: list[dict[int, Completion]] = [{} for _ in self._jobs]
        async for number, delta in self.deltas():
            if delta.completion is not None:
                found[number][delta.index] = delta.completion
        if any(len(outputs) < job.params.n for outputs, job in zip(found, self._jobs, strict=True)):
            raise EngineStoppedError("the engine gave no result")
        return [[outputs[index] for index in sorted(outputs)] for outputs in found]

    async def close(self) -> None:
        """Give up what has not ended."""
        self._abort()
        for stream in self._streams:
            await stream.aclose()

    def _abort(self) -> None:
        for name, left in zip(self._names, self._left, strict=False):
            if left:
                self._llm.abort(name)

    def _note(self, number: int, delta: Delta) -> None:
        if delta.error is not None:
            raise delta.error
        now, key, count = time.perf_counter(), (number, delta.index), len(delta.token_ids)
        completion = delta.completion
        if key in self._last:
            self._metrics.tokens(now - self._last[key], count)
        elif count > 1 and completion is not None and completion.decode_tokens_per_s:
            self._metrics.tokens((count - 1) / completion.decode_tokens_per_s, count - 1)
        if count:
            self._last[key] = now
        if completion is not None:
            self._left[number] -= 1
            self._metrics.finished(completion, self._jobs[number].params)


async def _forward(
    number: int,
    stream: AsyncIterator[Delta],
    queue: asyncio.Queue[tuple[int, Delta | BaseException | None]],
) -> None:
    try:
        async for delta in stream:
            await queue.put((number, delta))
        await queue.put((number, None))
    except Exception as error:
        await queue.put((number, error))
