"""Runs the model for the sequences of a step. The only part of the engine that makes tensors."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kuiperllm.core import Device, Tensor
from kuiperllm.core.device import Graph
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.scheduler import Step
from kuiperllm.engine.sequence import Sequence
from kuiperllm.models import Decoder
from kuiperllm.ops.attention import Batch

_GROWTH_TOKENS = 512  # the table of rotary angles grows in steps of this many positions


class Runner:
    """Prefill runs operator by operator; decoding is captured once per batch size and replayed.

    Args:
        model: what to run.
        cache: the keys and values of its layers.
        max_model_len: the longest sequence there will be.
    """

    def __init__(self, model: Decoder, cache: KVCache, max_model_len: int) -> None:
        self.model = model
        self.cache = cache
        self.max_model_len = max_model_len
        self._decoders: dict[int, _DecodeGraph] = {}
        self._table_width = 0
        self.kernel_s = 0.0
        """Time spent in captured decode steps so far."""

    def run(self, step: Step, num_blocks: int) -> Tensor | None:
        """Process the tokens of a step.

        Args:
            step: sequences whose blocks suffice for these tokens.
            num_blocks: how many blocks there are in all.

        Returns:
            float32 [S, V], valid until the next call: the logits after the last token of each sequence; None
            in the middle of a prompt.
        """
        self._reserve(step, num_blocks)
        if step.is_decode:
            size = len(step.sequences)
            if size not in self._decoders:
                self._decoders[size] = _DecodeGraph(self.model, self.cache, size, self._table_width)
            decoder = self._decoders[size]
            logits: Tensor | None = decoder.prepare(step.sequences)
            started = time.perf_counter()
            decoder.graph.replay()
            self.kernel_s += time.perf_counter() - started
        else:
            logits = self._prefill(step.sequences[0], step.num_tokens)
        for sequence in step.sequences:
            sequence.num_computed += step.num_tokens
        return logits

    def _reserve(self, step: Step, num_blocks: int) -> None:
        """Make cache and tables large enough; what was captured on smaller ones is thrown away."""
        tokens = max(sequence.num_computed for sequence in step.sequences) + step.num_tokens
        width = max(len(sequence.blocks) for sequence in step.sequences)
        positions = self.model.rotary.num_positions
        if num_blocks <= self.cache.num_blocks and tokens <= positions and width <= self._table_width:
            return
        self._decoders.clear()  # first: captured steps keep the memory of what is to be replaced
        self.cache.reserve(num_blocks)
        if tokens > positions:
            target = max(2 * positions, -(-tokens // _GROWTH_TOKENS) * _GROWTH_TOKENS)
            self.model.rotary.reserve(min(target, max(tokens, self.max_model_len)))
        if width > self._table_width:
            self._table_width = max(2 * self._table_width, width)

    def _prefill(self, sequence: Sequence, num_tokens: int) -> Tensor | None:
        first, size = sequence.num_computed, self.cache.block_size
        places = np.arange(first, first + num_tokens, dtype=np.int64)
        blocks = np.array(sequence.blocks, np.int32)
        ids = [sequence.token(place) for place in range(first, first + num_tokens)]
        device = self.model.device

        def put(values: object, dtype: type) -> Tensor:
            return Tensor.from_numpy(np.asarray(values, dtype)).to(device)

        batch = Batch(
            positions=put(places, np.int32),
            slot_mapping=put(blocks[places // size].astype(np.int64) * size + places % size, np.int64),
            block_table=put(blocks[None, :], np.int32),
            query_start_loc=put([0, num_tokens], np.int32),
            seq_lens=put([first + num_tokens], np.int32),
            max_query_len=num_tokens,
        )
        residual = self.model.forward(put(ids, np.int32), self.cache.layers, batch)
        is_end = first + num_tokens == sequence.num_tokens
        return self.model.logits(residual, batch) if is_end else None


class _Input:
    """A tensor that the host refills before each replay; on the host itself the two are one memory."""

    def __init__(self, host: np.ndarray[tuple[int, ...], np.dtype[Any]], device: Device) -> None:
        self.host = host
        self.tensor = Tensor.from_numpy(host).to(device)

    def upload(self) -> None:
        """Make what was written to `host` visible on the device."""
        if not self.tensor.device.is_host:
            self.tensor.copy_(Tensor.from_numpy(self.host).to(self.tensor.device))


class _DecodeGraph:
    """One decode step of a fixed number of sequences, captured on tensors that are refilled for each step."""

    def __init__(self, model: Decoder, cache: KVCache, size: int, table_width: int) -> None:
        device = model.device
        self._block_size = cache.block_size
        self._ids = _Input(np.zeros(size, np.int32), device)
        self._positions = _Input(np.zeros(size, np.int32), device)
        self._slots = _Input(np.full(size, -1, np.int64), device)
        self._lens = _Input(np.ones(size, np.int32), device)
        self._table = _Input(np.zeros((size, table_width), np.int32), device)
        self._tables: list[tuple[int, int]] = [(-1, 0)] * size
        batch = Batch(
            positions=self._positions.tensor,
            slot_mapping=self._slots.tensor,
            block_table=self._table.tensor,
            query_start_loc=Tensor.from_numpy(np.arange(size + 1, dtype=np.int32)).to(device),
            seq_lens=self._lens.tensor,
            max_query_len=1,
        )
        self.graph: Graph
        with device.capture() as self.graph:
            residual = model.forward(self._ids.tensor, cache.layers, batch)
            self._logits = model.logits(residual, batch)

    def prepare(self, sequences: list[Sequence]) -> Tensor:
        """Set the graph up for the newest token of each sequence; where it will leave the logits [S, V]."""
        new_blocks = False
        for row, sequence in enumerate(sequences):
            place = sequence.num_computed
            block, within = divmod(place, self._block_size)
            self._ids.host[row] = sequence.token(place)
            self._positions.host[row] = place
            self._slots.host[row] = sequence.blocks[block] * self._block_size + within
            self._lens.host[row] = place + 1
            table = (sequence.number, len(sequence.blocks))
            if self._tables[row] != table:
                self._tables[row] = table
                self._table.host[row, : len(sequence.blocks)] = sequence.blocks
                new_blocks = True
        for changed in (self._ids, self._positions, self._slots, self._lens):
            changed.upload()
        if new_blocks:
            self._table.upload()
        return self._logits
