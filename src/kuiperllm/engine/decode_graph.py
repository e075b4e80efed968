"""A decode step of a fixed number of sequences, captured once and replayed.

What a step needs to know lies on the device: token ids, positions, lengths, cache slots. A step that also
chooses tokens leaves all of that ready for the next one, so steps of the same sequences follow each other
without the host: it only reads tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from kuiperllm.core import DType, Tensor
from kuiperllm.core.device import Graph
from kuiperllm.engine.inputs import Input
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.sequence import Sequence
from kuiperllm.models import Decoder
from kuiperllm.ops.attention import Batch
from kuiperllm.ops.greedy_step import greedy_step
from kuiperllm.ops.sample_step import sample_step

Choice = Literal["greedy", "sample"]
"""How a step chooses tokens: the most likely one for all, or as each sequence's parameters say."""

_RING = 4  # steps whose tokens are kept; more than there can be under way at once


class DecodeState:
    """What decode steps of `size` sequences work on, and their graphs.

    Args:
        model: what to run.
        cache: the keys and values of its layers; must not grow while this is used.
        size: how many sequences.
        table_width: most blocks of a sequence.
        vocab_size: ids below this may be chosen.
    """

    def __init__(self, model: Decoder, cache: KVCache, size: int, table_width: int, vocab_size: int) -> None:
        self._model, self._cache, self._vocab_size = model, cache, vocab_size
        device = model.device

        def make(value: float, dtype: Any, *shape: int) -> Input:
            return Input(np.full((size, *shape), value, dtype), device)

        self._ids, self._positions, self._lens = (make(value, np.int32) for value in (0, 0, 1))
        self._slots = make(-1, np.int64)
        self._table = make(0, np.int32, table_width)
        self._temperature, self._top_p, self._min_p = (make(value, np.float32) for value in (0, 1, 0))
        self._top_k = make(0, np.int32)
        self._seeds = make(0, np.int64)
        self._steps = Tensor.zeros((1,), DType.int32, device)
        self._num_chosen = 0
        self.tokens, self._tokens = device.backend.pinned((_RING, size), DType.int32)
        self._batch = Batch(
            positions=self._positions.tensor,
            slot_mapping=self._slots.tensor,
            block_table=self._table.tensor,
            query_start_loc=Tensor.from_numpy(np.arange(size + 1, dtype=np.int32)).to(device),
            seq_lens=self._lens.tensor,
            max_query_len=1,
            is_captured_step=True,
        )
        self.logits: Tensor
        """float32 [S, V]: where the step that was prepared last leaves the logits."""
        self._graphs: dict[Choice | None, tuple[Graph, Tensor]] = {}
        self._next: list[tuple[int, int]] = []
        self._tables: list[tuple[int, int]] = []

    def follows(self, sequences: list[Sequence]) -> bool:
        """Whether the device is ready for the next token of each of these sequences, whatever it is."""
        return self._next == _places(sequences)

    def prepare(self, sequences: list[Sequence], choice: Choice | None) -> Graph:
        """Set everything up for the next token of each sequence; the step to replay then.

        Args:
            sequences: whose newest tokens are known, unless the device `follows` them.
            choice: how the step chooses tokens; None: it only makes logits.
        """
        graph, self.logits = self._graph(choice)
        if not self.follows(sequences):
            self._upload(sequences)
        tables = [(sequence.number, len(sequence.blocks)) for sequence in sequences]
        if tables != self._tables:
            self._upload_tables(sequences, tables)
        self._next = [(number, place + 1) for number, place in _places(sequences)] if choice else []
        return graph

    def chosen_row(self) -> int:
        """The row of `tokens` that a step that chooses, just replayed, writes to."""
        row = self._num_chosen % _RING
        self._num_chosen += 1
        return row

    def _upload_tables(self, sequences: list[Sequence], tables: list[tuple[int, int]]) -> None:
        """The blocks of all sequences, and their slots: the last step could not know those in new blocks."""
        size = self._cache.block_size
        for row, sequence in enumerate(sequences):
            self._table.host[row, : len(sequence.blocks)] = sequence.blocks
            block, within = divmod(sequence.num_computed, size)
            self._slots.host[row] = sequence.blocks[block] * size + within
        self._tables = tables
        self._table.upload()
        self._slots.upload()

    def _upload(self, sequences: list[Sequence]) -> None:
        """All that the device has no other way to know; the tables follow."""
        self._tables = []
        for row, sequence in enumerate(sequences):
            place = sequence.num_computed
            self._ids.host[row] = sequence.token(place)
            self._positions.host[row] = place
            self._lens.host[row] = place + 1
            params = sequence.params
            self._temperature.host[row] = params.temperature
            self._top_k.host[row] = params.top_k
            self._top_p.host[row] = params.top_p
            self._min_p.host[row] = params.min_p
            self._seeds.host[row] = np.uint64(sequence.seed).astype(np.int64)
        for changed in (
            self._ids, self._positions, self._lens,
            self._temperature, self._top_k, self._top_p, self._min_p, self._seeds,
        ):  # fmt: skip
            changed.upload()

    def _graph(self, choice: Choice | None) -> tuple[Graph, Tensor]:
        if choice not in self._graphs:
            backend = self._model.device.backend
            backend.prepare(lambda: self._step(choice))
            with backend.capture() as graph:
                logits = self._step(choice)
            self._graphs[choice] = graph, logits
        return self._graphs[choice]

    def _step(self, choice: Choice | None) -> Tensor:
        """One step, to be captured."""
        batch = self._batch
        residual = self._model.forward(self._ids.tensor, self._cache.layers, batch)
        logits = self._model.logits(residual, batch)
        state = (
            self._ids.tensor,
            batch.positions,
            batch.seq_lens,
            batch.slot_mapping,
            batch.block_table,
            self._cache.block_size,
            self._tokens,
            self._steps,
        )
        allowed = logits[:, : self._vocab_size]
        if choice == "greedy":
            greedy_step(allowed, *state)
        elif choice == "sample":
            sample_step(
                allowed,
                self._temperature.tensor,
                self._top_k.tensor,
                self._top_p.tensor,
                self._min_p.tensor,
                self._seeds.tensor,
                *state,
            )
        return logits


def _places(sequences: list[Sequence]) -> list[tuple[int, int]]:
    """Which token of which sequence a decode step would process."""
    return [(sequence.number, sequence.num_computed) for sequence in sequences]
