"""Takes in a piece of a prompt.

A GPU is done with a short prompt before Python has queued all of its kernels. So there, lengths that come
again are captured: the piece is padded to one of a few lengths, with tokens that leave no trace, and a graph
of that length is replayed.
"""

from __future__ import annotations

import numpy as np

from kuiperllm.core import Tensor
from kuiperllm.core.device import Graph
from kuiperllm.engine.inputs import Input
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.sequence import Sequence
from kuiperllm.models import Decoder
from kuiperllm.ops.attention import Batch

_CAPTURED_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Beyond, even a small model keeps a GPU busy for longer than Python needs."""


class Prefill:
    """One pass over `length` tokens of one sequence, or fewer.

    Args:
        model: what to run.
        cache: the keys and values of its layers; must not grow while this is used.
        length: the most tokens that a pass can take in.
        table_width: the most blocks of the sequence.
    """

    def __init__(self, model: Decoder, cache: KVCache, length: int, table_width: int) -> None:
        self._model, self._cache = model, cache
        device = model.device

        def make(dtype: type, *shape: int) -> Input:
            return Input(np.zeros(shape, dtype), device)

        self._ids, self._positions, self._slots = (
            make(dtype, length) for dtype in (np.int32, np.int32, np.int64)
        )
        self._table, self._starts = make(np.int32, 1, table_width), make(np.int32, 2)
        self._lens, self._last = make(np.int32, 1), make(np.int32, 1)
        self._batch = Batch(
            positions=self._positions.tensor,
            slot_mapping=self._slots.tensor,
            block_table=self._table.tensor,
            query_start_loc=self._starts.tensor,
            seq_lens=self._lens.tensor,
            max_query_len=length,
            last_tokens=self._last.tensor,
        )
        self.captured: tuple[Graph, Tensor] | None = None
        """The pass as a graph, and where that leaves the logits."""

    @staticmethod
    def captured_length(num_tokens: int) -> int | None:
        """The length to pad so many tokens to; None: they are too many to gain from that."""
        return next((length for length in _CAPTURED_LENGTHS if length >= num_tokens), None)

    def upload(self, sequence: Sequence, num_tokens: int) -> None:
        """Set the next `num_tokens` tokens of a sequence up."""
        first, size = sequence.num_computed, self._cache.block_size
        places = np.arange(first, first + num_tokens, dtype=np.int64)
        blocks = np.array(sequence.blocks, np.int32)
        self._ids.host[:num_tokens] = sequence.tokens(first, num_tokens)
        self._positions.host[:num_tokens] = places
        self._slots.host[:num_tokens] = blocks[places // size].astype(np.int64) * size + places % size
        self._slots.host[num_tokens:] = -1  # of padding, nothing is kept
        self._table.host[0, : len(blocks)] = blocks
        self._starts.host[1] = num_tokens
        self._lens.host[0] = first + num_tokens
        self._last.host[0] = num_tokens - 1
        for changed in (
            self._ids, self._positions, self._slots, self._table, self._starts, self._lens, self._last,
        ):  # fmt: skip
            changed.upload()

    def run(self) -> Tensor:
        """Queue the pass; its residual stream, [length, D]."""
        return self._model.forward(self._ids.tensor, self._cache.layers, self._batch)

    def logits(self, residual: Tensor) -> Tensor:
        """The logits after the last token, float32 [1, V]."""
        return self._model.logits(residual, self._batch)

    def capture(self, beside: Graph | None) -> None:
        """Record both. `beside`: the graph of another length, whose memory serves this one as well."""
        with self._model.device.capture(beside) as graph:
            logits = self.logits(self.run())
        self.captured = graph, logits
