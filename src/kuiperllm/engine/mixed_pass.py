"""A pass over pieces of prompts, and single tokens of other sequences beside them.

A GPU is done with a few hundred tokens before Python has queued all of its kernels. So there, shapes that
come again are captured: a step is padded to one of not too many shapes, with tokens and sequences that leave
no trace, and a graph of that shape is replayed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kuiperllm.core import DType, Tensor
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
_MOST_PIECES = 16  # of a captured pass


class Shape(NamedTuple):
    """What a pass has room for. Sequences that have a single token come first, each in a place of its own."""

    num_tokens: int
    """Those of all sequences; the singles' places included, used or not."""
    num_single: int
    num_pieces: int
    """Other sequences."""
    num_sampled: int
    """Sequences after which logits are wanted."""
    max_query_len: int
    """The most tokens of a piece."""
    table_width: int
    """The most blocks of a sequence."""

    @classmethod
    def of(cls, step: Step, table_width: int) -> Shape:
        """Just what a step needs."""
        pieces = len(step.sequences) - step.num_single
        return cls(
            sum(step.num_tokens), step.num_single, pieces, step.num_sampled, max(step.num_tokens), table_width
        )

    def padded(self, num_single: int, num_sampled: int) -> Shape | None:
        """One of the shapes that are captured, with room for this one; None: it is too large for that to pay.

        Args:
            num_single: room for single tokens, as many or more.
            num_sampled: room for logits, as many or more.
        """
        wanted = self.num_tokens - self.num_single + num_single
        tokens = next((length for length in _CAPTURED_LENGTHS if length >= wanted), None)
        if tokens is None or self.num_pieces > _MOST_PIECES:
            return None
        pieces = 1 << (self.num_pieces - 1).bit_length()
        return Shape(tokens, num_single, pieces, num_sampled, tokens - num_single, self.table_width)


class MixedPass:
    """One pass.

    Args:
        model: what to run.
        cache: the keys and values of its layers; must not grow while this is used.
        logits: float32 [num_sampled or more, V], where all passes leave them.
        graphs: captures the pass, if that is wanted.
        shape: what there is room for.
    """

    def __init__(self, model: Decoder, cache: KVCache, logits: Tensor, graphs: Graphs, shape: Shape) -> None:
        self._model, self._cache, self._memory, self._shape = model, cache, graphs, shape
        self._logits = logits[: shape.num_sampled]
        tokens, sequences, sampled = shape.num_tokens, shape.num_single + shape.num_pieces, shape.num_sampled
        fields: Fields = dict.fromkeys(("given", "source", "positions"), (np.int32, (tokens,)))
        fields |= {"slots": (np.int64, (tokens,)), "lens": (np.int32, (sequences,))}
        fields |= {"starts": (np.int32, (sequences + 1,))}
        fields |= {"table": (np.int32, (sequences, shape.table_width))}
        fields |= dict.fromkeys(("last", "ends"), (np.int32, (sampled,)))
        fields |= {name: (dtype, (sampled,)) for name, dtype in PARAMETERS.items()}
        self._inputs = Inputs(model.device, fields)
        self._ids = Tensor.empty((tokens,), DType.int32, model.device)
        tensors = self._inputs.tensors
        self.draws = {name: tensors[name] for name in PARAMETERS} | {"positions": tensors["ends"]}
        """What `ops.sample` is to know: the parameters, and where each new token will stand."""
        self._batch = Batch(
            positions=tensors["positions"],
            slot_mapping=tensors["slots"],
            block_table=tensors["table"],
            query_start_loc=tensors["starts"],
            seq_lens=tensors["lens"],
            max_query_len=shape.max_query_len,
            last_tokens=tensors["last"],
            num_single=shape.num_single,
        )
        self.captured: Graph | None = None
        """What `graph` gives, once it has been asked for."""

    def upload(self, step: Step, rows: Rows, newest: Newest) -> None:
        """Set a step up.

        Args:
            step: for which there is room.
            rows: the sequences' blocks and parameters.
            newest: tokens that the host does not know yet.
        """
        host, room, single = self._inputs.host, self._shape.num_single, step.num_single
        of = np.fromiter((sequence.row for sequence in step.sequences), np.intp, len(step.sequences))
        counts, firsts = np.array(step.num_tokens), np.array(step.starts)
        ends = counts.cumsum()
        # Where sequences and tokens lie: behind the single ones there may be room.
        at = np.arange(len(of))
        at[single:] += room - single
        tokens = np.arange(ends[-1])
        tokens[single:] += room - single
        places = np.arange(ends[-1]) + np.repeat(firsts - (ends - counts), counts)

        host["positions"][:], host["slots"][:] = 0, -1
        host["positions"][tokens] = places
        host["slots"][tokens] = rows.slots(np.repeat(of, counts), places)
        host["lens"][:room], host["lens"][room:] = 1, 0
        host["lens"][at] = firsts + counts
        host["table"][:] = 0
        host["table"][at] = rows.table[of, : self._shape.table_width]
        host["starts"][: room + 1] = np.arange(room + 1)
        host["starts"][room + 1 :] = ends[-1] + room - single
        host["starts"][at[single:] + 1] = ends[single:] + room - single

        sampled = step.num_sampled
        host["last"][:], host["ends"][:] = 0, 1
        host["last"][:sampled] = tokens[ends[:sampled] - 1]
        host["ends"][:sampled] = firsts[:sampled] + counts[:sampled]
        for name, values in rows.parameters.items():
            host[name][:sampled], host[name][sampled:] = values[of[:sampled]], 0

        given, source = np.zeros((2, ends[-1]), np.int32)
        newest.fill(step, given, source)
        host["given"][:], host["source"][:] = 0, -1
        host["given"][tokens], host["source"][tokens] = given, source
        self._inputs.upload()
        known = self._inputs.tensors["given"]
        pick_tokens(known, self._inputs.tensors["source"], newest.tokens or known, out=self._ids)

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
