"""What the engine is asked for: a prompt, how to continue it, and how urgent that is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kuiperllm.config import SamplingParams


class Guide(Protocol):
    """Which tokens may come next in one output: a grammar with its state. Called from the engine's thread.

    An exception that one of its methods raises ends its request with that error, and no other request.
    """

    def fill(self, bits: NDArray[np.int32]) -> None:
        """Say which tokens may come next, end-of-text tokens included.

        Args:
            bits: int32 [ceil(V / 32)], to be overwritten: token t may come if bit t % 32 of word t // 32
                is 1.
        """

    def accept(self, token_id: int) -> None:
        """Take in the token that was chosen."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow, so that the output ends here."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt, to be continued `params.n` times."""

    request_id: str
    """Names it; no two that are under way may share one."""
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower goes first; of equal ones, the one that came first."""
    make_guide: Callable[[], Guide] | None = None
    """Makes what restricts the tokens of an output; called once for each of the outputs."""
    cache_salt: str = ""
    """Only requests of the same salt share cached prompts."""
    streams: bool = True
    """Whether text is wanted as it is made, or only when an output is complete."""
    embeds: bool = False
    """Whether the prompt's embedding is wanted instead of text: `Completion.embedding`."""
    arrived: float = field(default_factory=time.perf_counter)
    """When it came, by `time.perf_counter`."""
