"""Decode steps of a fixed number of sequences, captured once and replayed.

What a step needs to know lies on the device: token ids, positions, lengths, cache slots. A step that also
chooses tokens leaves all of that ready for the next one, so steps of the same sequences follow each other
without the host: it only reads tokens, and says which blocks have been added.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from kuiperllm.core import DType, Tensor
from kuiperllm.core.device import Graph
from kuiperllm.engine.graphs import Graphs
from kuiperllm.engine.inputs import Fields, Inputs
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.newest import Newest, TokenRing
from kuiperllm.engine.rows import PARAMETERS, Rows
from kuiperllm.engine.scheduler import Step
from kuiperllm.models import Decoder
from kuiperllm.ops.attention import Batch
from kuiperllm.ops.greedy_step import greedy_step
from kuiperllm.ops.pick_tokens import pick_tokens
from kuiperllm.ops.sample_step import sample_step

Choice = Literal["greedy", "sample"]
"""How a step chooses tokens: the most likely one for all, or as each sequence's parameters say."""

_PADDING_SLOT = -2  # see `ops.advance_step`


class DecodeState:
    """What decode steps of up to `size` sequences work on, and their graphs. Rows that are left are padding.

    Args:
        model: what to run.
        cache: the keys and values of its layers; must not grow while this is used.
        size: how many sequences.
        table_width: most blocks of a sequence.
        vocab_size: ids below this may be chosen.
        logits: float32 [size or more, V], where all passes leave them.
        ring: where graphs leave the tokens that they choose.
        graphs: captures them.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        size: int,
        table_width: int,
        vocab_size: int,
        logits: Tensor,
        ring: TokenRing,
        graphs: Graphs,
    ) -> None:
        self._model, self._cache, self._vocab_size, self._ring = model, cache, vocab_size, ring
        self._size, self._logits, self._memory = size, logits[:size], graphs
        device = model.device
        fields: Fields = dict.fromkeys(("given", "source", "positions", "lens"), (np.int32, (size,)))
        fields |= {name: (dtype, (size,)) for name, dtype in PARAMETERS.items()}
        fields |= {"slots": (np.int64, (size,)), "table": (np.int32, (size, table_width))}
        self._inputs = Inputs(device, fields)
        self._ids = Tensor.zeros((size,), DType.int32, device)
        tensors = self._inputs.tensors
        self.draws = {name: tensors[name] for name in PARAMETERS} | {"positions": tensors["lens"]}
        """What `ops.sample` is to know of each row: the parameters, and where the new token will stand."""
        self._batch = Batch(
            positions=tensors["positions"],
            slot_mapping=tensors["slots"],
            block_table=tensors["table"],
            query_start_loc=Tensor.from_numpy(np.arange(size + 1, dtype=np.int32)).to(device),
            seq_lens=tensors["lens"],
            max_query_len=1,
            is_captured_step=True,
        )
        self.is_greedy = True
        """Whether all the sequences of the step always take the most likely token."""
        self._graphs: dict[Choice | None, Graph] = {}

    def prepare(self, step: Step, rows: Rows, newest: Newest, *, follows: bool) -> None:
        """Set everything up for a step.

        Args:
            step: a decode step of at most as many sequences as this is for.
            rows: their blocks and parameters.
            newest: tokens that the host does not know yet.
            follows: whether the last replay of this object's graphs chose the newest tokens of just these
                sequences, so that the device knows all but new blocks.
        """
        if follows and not step.changed:
            return
        count, host = len(step.sequences), self._inputs.host
        of = np.fromiter((sequence.row for sequence in step.sequences), np.intp, count)
        places = np.array(step.starts, np.int64)
        host["slots"][:count] = rows.slots(of, places)
        host["table"][:count] = rows.table[of, : host["table"].shape[1]]
        if follows:
            self._inputs.upload("slots")
            return
        host["slots"][count:], host["table"][count:] = _PADDING_SLOT, 0
        host["positions"][:count], host["positions"][count:] = places, 0
        host["lens"][:count], host["lens"][count:] = places + 1, 1
        for name, values in rows.parameters.items():
            host[name][:count], host[name][count:] = values[of], 0
        self.is_greedy = not host["temperature"].any()
        newest.fill(step, host["given"], host["source"])
        self._inputs.upload()
        given = self._inputs.tensors["given"]
        pick_tokens(given, self._inputs.tensors["source"], newest.tokens or given, out=self._ids)

    def graph(self, choice: Choice | None) -> Graph:
        """A step that chooses tokens, or only makes logits.

        Args:
            choice: how to choose; None: not at all.
        """
        if choice not in self._graphs:
            self._model.device.backend.prepare(lambda: self._step(choice))
            with self._memory.capture() as graph:
                self._step(choice)
            self._graphs[choice] = graph
        return self._graphs[choice]

    def _step(self, choice: Choice | None) -> None:
        """One step, to be captured."""
        batch = self._batch
        residual = self._model.forward(self._ids, self._cache.layers, batch)
        self._model.logits(residual, batch, out=self._logits)
        logits = self._logits[:, : self._vocab_size]
        state = (
            self._ids,
            batch.positions,
            batch.seq_lens,
            batch.slot_mapping,
            batch.block_table,
            self._cache.block_size,
            self._ring.history[:, : self._size],
            self._ring.step,
        )
        if choice == "greedy":
            greedy_step(logits, *state)
        elif choice == "sample":
            temperature, top_k, top_p, min_p, seeds = (self.draws[name] for name in PARAMETERS)
            sample_step(logits, temperature, top_k, top_p, min_p, seeds, *state)
