"""The tokens that passes choose, on their way to the host and to the next pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.engine.scheduler import Step
from kuiperllm.engine.sequence import Sequence

_PASSES = 4  # whose tokens are kept; more than there can be under way at once


class TokenRing:
    """Memory that the device writes tokens to and the host reads, a row for each pass, used in turn.

    Args:
        device: what writes.
        size: most tokens of a pass.

    Attributes:
        history: int32 [R, size], for graphs: they take the rows in turn by themselves.
        step: int32 [1], how many graphs have done so.
    """

    def __init__(self, device: Device, size: int) -> None:
        backend = device.backend
        of_graphs, self.history = backend.pinned((_PASSES, size), DType.int32)
        of_others, others = backend.pinned((_PASSES, size), DType.int32)
        self.step = Tensor.zeros((1,), DType.int32, device)
        self._of_graphs = list(zip(of_graphs, self.history, strict=True))
        self._of_others = list(zip(of_others, others, strict=True))
        self._num_graphs = self._num_others = 0

    def of_graph(self) -> tuple[NDArray[Any], Tensor]:
        """The row that the graph just replayed writes to, for the host and for the device."""
        row = self._num_graphs % _PASSES
        self._num_graphs += 1
        return self._of_graphs[row]

    def take(self) -> tuple[NDArray[Any], Tensor]:
        """A row for the tokens of another pass, for the host and for the device."""
        row = self._num_others % _PASSES
        self._num_others += 1
        return self._of_others[row]

    def reset(self) -> None:
        """Begin anew, with nothing under way: an exception may have come between a replay and its count."""
        self.step.buffer.fill(0)
        self._num_graphs = 0


class Newest:
    """Where the tokens of the last pass are.

    Args:
        sequences: those that it chose tokens for.
        tokens: int32 [len(sequences) or more], the tokens; None if there was no such pass.
    """

    def __init__(self, sequences: list[Sequence], tokens: Tensor | None) -> None:
        self.tokens = tokens
        self._sequences = sequences

    def fill(self, step: Step, given: NDArray[np.int32], source: NDArray[np.int32]) -> None:
        """Write down the tokens of a step that the host knows, and where the device finds the others.

        Args:
            step: the step.
            given: known tokens; what is behind them is left as it is.
            source: for the others, the index in `tokens`; -1 for known ones.
        """
        source[:] = -1
        index: dict[int, int] | None = None
        begin = 0
        for sequence, start, count in zip(step.sequences, step.starts, step.num_tokens, strict=True):
            if start + count <= sequence.num_known:
                given[begin : begin + count] = sequence.tokens(start, count)
            else:
                if index is None:
                    index = {other.number: place for place, other in enumerate(self._sequences)}
                source[begin] = index[sequence.number]
            begin += count
