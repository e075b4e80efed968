"""Deltas on their way from the engine to a reader, which may be slower than the engine."""

from __future__ import annotations

import asyncio
from itertools import chain

from kuiperllm.engine.output import Delta
from kuiperllm.errors import KuiperError


class Mailbox:
    """Holds what one request's reader has yet to take; used in the thread of the reader's event loop only.

    What has gathered of an output is taken as one delta. So a slow reader costs memory for text, not for
    thousands of objects, and falls behind no further than it has to.

    Args:
        num_outputs: how many outputs the request has.

    Attributes:
        is_abandoned: whether nobody reads any more: then nothing is kept.
    """

    def __init__(self, num_outputs: int) -> None:
        self.is_abandoned = False
        self._open = num_outputs
        self._waiting: dict[int, list[Delta]] = {}  # by index of the output
        self._error: KuiperError | None = None
        self._reader: asyncio.Future[None] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing more will come."""
        return self._open == 0 or self._error is not None

    def put(self, delta: Delta) -> None:
        """Add a delta."""
        if delta.error is not None:
            self.fail(delta.error)
            return
        if not self.is_abandoned:
            self._waiting.setdefault(delta.index, []).append(delta)
        if delta.completion is not None:
            self._open -= 1
        self._wake()

    def fail(self, error: KuiperError) -> None:
        """Let the reader have an exception, once it has taken what was there before."""
        self._error = error
        self._wake()

    async def take(self) -> Delta | None:
        """What has come of one output; None at the end, and once it is abandoned.

        Raises:
            KuiperError: what the request failed with.
        """
        while self.is_abandoned or not self._waiting:
            if self._error is not None:
                raise self._error
            if self._open == 0 or self.is_abandoned:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return merged(self._waiting.pop(next(iter(self._waiting))))

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def merged(deltas: list[Delta]) -> Delta:
    """Deltas of one output, in order, as one."""
    if len(deltas) == 1:
        return deltas[0]
    first, last = deltas[0], deltas[-1]
    logprobs = None
    if first.logprobs is not None:
        logprobs = list(chain.from_iterable(delta.logprobs or () for delta in deltas))
    return Delta(
        request_id=first.request_id,
        index=first.index,
        text="".join(delta.text for delta in deltas),
        token_ids=list(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs,
        completion=last.completion,
    )
