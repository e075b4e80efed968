"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

from kuiperllm.config import EngineConfig
from kuiperllm.engine.loading import LoadedModel
from kuiperllm.engine.output import Delta
from kuiperllm.engine.request import Request
from kuiperllm.engine.stats import EngineStats


class Engine:
    """Works on many requests at once; knows no threads and no text that comes in.

    All methods are to be called from one thread at a time.

    Args:
        loaded: the model.
        config: how to run it.
        reserve: take the memory of the whole key/value cache now, instead of growing with the need.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig, *, reserve: bool = False) -> None: ...

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UsageError: the prompt is empty, or the id is in use.
            ContextLengthError: the prompt leaves no room for output, or never fits into the cache.
            TokenizerError: a token id is out of range.
        """

    def abort(self, request_id: str) -> None:
        """Give a request up, whatever its state; nothing more comes from it. Unknown ids are ignored."""

    def step(self) -> list[Delta]:
        """Run the model once, and give what became certain.

        Where the device works on its own, the next pass is queued before this returns. What goes wrong with
        one request comes back as its `Delta.error`.

        Raises:
            KuiperError: the engine cannot go on; all requests are lost. `reset` makes it usable again.
        """

    def reset(self) -> None:
        """Give up all requests and take all blocks back; also after an exception at any place."""

    def warm_up(self) -> None:
        """Compile the kernels and record the graphs of all batch sizes, so that no request waits for them."""

    def stats(self) -> EngineStats:
        """Counters and gauges; a copy."""
