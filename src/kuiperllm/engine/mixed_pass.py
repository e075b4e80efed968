"""A pass over pieces of prompts, and single tokens of other sequences beside them.

A GPU is done with a short prompt before Python has queued all of its kernels. So there, lengths of single
prompts that come again are captured: the piece is padded to one of a few lengths, with tokens that leave no
trace, and a graph of that length is replayed.
"""

from __future__ import annotations

import numpy as np

from kuiperllm.core import Tensor
from kuiperllm.core.device import Graph
from kuiperllm.engine.graphs import Graphs
from kuiperllm.engine.inputs import Fields, Inputs
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.newest import Newest
from kuiperllm.engine.rows import PARAMETERS, Rows
from kuiperllm.engine.scheduler import Step
from kuiperllm.models import Decoder
from kuiperllm.ops.attention import Batch
from kuiperllm.ops.pick_tokens import pick_tokens

_CAPTURED_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Beyond, even a small model keeps a GPU busy for longer than Python needs."""


def captured_length(num_tokens: int) -> int | None:
    """The length to pad so many tokens of a prompt to; None: they are too many to gain from that."""
    return next((length for length in _CAPTURED_LENGTHS if length >= num_tokens), None)


class MixedPass:
    """One pass.

    Args:
        model: what to run.
        cache: the keys and values of its layers; must not grow while this is used.
        logits: float32 [num_sampled or more, V], where all passes leave them.
        graphs: captures the pass, if that is wanted.
        num_tokens: tokens in all, or, for a single sequence, the most it can have.
        num_sequences: how many sequences they belong to.
        num_single: how many of these, the first ones, have one token and are followed by others.
        num_sampled: after how many, the first ones, logits are wanted.
        max_query_len: the most tokens of a sequence.
        table_width: the most blocks of a sequence.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        logits: Tensor,
        graphs: Graphs,
        *,
        num_tokens: int,
        num_sequences: int,
        num_single: int,
        num_sampled: int,
        max_query_len: int,
        table_width: int,
    ) -> None:
        self._model, self._cache, self._logits, self._memory = model, cache, logits[:num_sampled], graphs
        fields: Fields = dict.fromkeys(("given", "source", "positions"), (np.int32, (num_tokens,)))
        fields |= dict.fromkeys(("lens", "last"), (np.int32, (num_sequences,)))
        fields |= {name: (dtype, (num_sequences,)) for name, dtype in PARAMETERS.items()}
        fields |= {
            "slots": (np.int64, (num_tokens,)),
            "starts": (np.int32, (num_sequences + 1,)),
            "table": (np.int32, (num_sequences, table_width)),
        }
        self._inputs = Inputs(model.device, fields)
        tensors = self._inputs.tensors
        self._ids = Tensor.empty((num_tokens,), tensors["given"].dtype, model.device)
        self.draws = {name: tensors[name][:num_sampled] for name in PARAMETERS}
        self.draws["positions"] = tensors["lens"][:num_sampled]
        """What `ops.sample` is to know: the parameters, and where each new token will stand."""
        self._batch = Batch(
            positions=tensors["positions"],
            slot_mapping=tensors["slots"],
            block_table=tensors["table"],
            query_start_loc=tensors["starts"],
            seq_lens=tensors["lens"],
            max_query_len=max_query_len,
            last_tokens=tensors["last"][:num_sampled],
            num_single=num_single,
        )
        self.captured: Graph | None = None
        """What `graph` gives, once it has been asked for."""

    def upload(self, step: Step, rows: Rows, newest: Newest) -> None:
        """Set a step up.

        Args:
            step: sequences with the numbers of tokens that this is for.
            rows: their blocks and parameters.
            newest: tokens that the host does not know yet.
        """
        host, counts = self._inputs.host, np.array(step.num_tokens)
        of = np.fromiter((sequence.row for sequence in step.sequences), np.intp, len(counts))
        ends, firsts = counts.cumsum(), np.array(step.starts)
        total = int(ends[-1])
        places = np.arange(total) + np.repeat(firsts - (ends - counts), counts)
        host["positions"][:total] = places
        host["slots"][:total], host["slots"][total:] = rows.slots(np.repeat(of, counts), places), -1
        host["table"][:] = rows.table[of, : host["table"].shape[1]]
        host["starts"][1:], host["last"][:], host["lens"][:] = ends, ends - 1, firsts + counts
        for name, values in rows.parameters.items():
            host[name][:] = values[of]
        newest.fill(step, host["given"], host["source"])
        self._inputs.upload()
        given = self._inputs.tensors["given"]
        pick_tokens(given, self._inputs.tensors["source"], newest.tokens or given, out=self._ids)

    def run(self) -> Tensor:
        """Queue the pass; its residual stream, [num_tokens, D]."""
        return self._model.forward(self._ids, self._cache.layers, self._batch)

    def logits(self, residual: Tensor) -> None:
        """Queue the logits after the last token of each sampled sequence."""
        self._model.logits(residual, self._batch, out=self._logits)

    def graph(self) -> Graph:
        """Both as a graph."""
        if self.captured is None:
            with self._memory.capture() as graph:
                self.logits(self.run())
            self.captured = graph
        return self.captured
