"""Runs the model for the sequences of a step. The part of the engine that makes tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import DType, Tensor
from kuiperllm.core.device import Event, Graph
from kuiperllm.engine.decode_graph import DecodeState
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.mixed_pass import MixedPass
from kuiperllm.engine.newest import Newest
from kuiperllm.engine.outbox import Outbox
from kuiperllm.engine.passes import Passes, reports
from kuiperllm.engine.rows import Rows
from kuiperllm.engine.scheduler import Step
from kuiperllm.engine.sequence import Sequence
from kuiperllm.models import Decoder
from kuiperllm.ops.argmax import argmax
from kuiperllm.ops.bias_logits import bias_logits
from kuiperllm.ops.logprobs import logprobs
from kuiperllm.ops.mask_logits import mask_logits
from kuiperllm.ops.penalize import penalize
from kuiperllm.ops.pick_tokens import pick_tokens
from kuiperllm.ops.sample import sample

LOGITS_BYTES = 128 << 20
"""Logits that are held at once: 219 places of a vocabulary of 152,000, or 1,048 of one of 32,000."""

RECORDED_WORK = 1 << 39
"""Tokens times bytes of weights of the largest pass that a host records before it runs it as a whole.

Python is done with all of its operators in a third of the time if none of them sweeps the caches meanwhile.
But a pass cannot be interrupted then: this is about a second on two cores.
"""

Read = Callable[[], NDArray[Any]]
"""Gives values that the device has computed; to be called once, after the pass is done."""


class Launched:
    """A pass that was queued.

    Attributes:
        step: what it works on.
        logits: float32 [num_sampled, V] if tokens are still to be chosen, before any other pass is queued.
        draws: what `ops.sample` is to know of each of these rows.
        logprobs: how likely the chosen tokens were, which ones were most likely, and how likely those were.
        prompt_logprobs: sequences, the place of the first token that is reported on, and the same of these.
        embeddings: embedded sequences and their last hidden states.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.logits: Tensor | None = None
        self.draws: Mapping[str, Tensor] = {}
        self.logprobs: list[Read] = []
        self.prompt_logprobs: list[tuple[Sequence, int, list[Read]]] = []
        self.embeddings: list[tuple[Sequence, Read]] = []
        self._tokens: NDArray[Any] | None = None
        self._event: Event | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of the pass has been queued, the choice of tokens included."""
        return self._event is not None

    def complete(self, event: Event, tokens: NDArray[Any] | None) -> None:
        """Note that all of it has been queued: behind the event, the tokens are there."""
        self._event, self._tokens = event, tokens

    def wait(self) -> list[int]:
        """Wait until the pass is done; the token of each sampled sequence."""
        assert self._event is not None
        self._event.wait()
        if self._tokens is None:
            return []
        tokens: list[int] = self._tokens[: self.step.num_sampled].tolist()
        return tokens


class Runner:
    """Queues passes, each of which may begin with tokens that the one before it has yet to choose.

    Args:
        model: what to run.
        cache: the keys and values of its layers.
        max_num_seqs: most sequences of a step.
        max_model_len: the longest sequence there will be.
        vocab_size: ids below this may be chosen (default: all of the model's).
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.vocab_size = vocab_size or model.config.vocab_size
        self.device_s = 0.0
        """Time that the host spent in captured passes, or waiting for some, so far."""
        self.passes = Passes(model, cache, max_num_seqs, max_model_len, self.vocab_size)
        self._rows = Rows(max_num_seqs, self.passes.widest, cache.block_size)
        self._outbox = Outbox(model.device)
        self._newest = Newest([], None)
        self._following: tuple[DecodeState, list[Sequence]] | None = None
        """What chose the newest tokens, and whose these are, if that was a graph."""

    def launch(self, step: Step, num_blocks: int, *, chooses: bool) -> Launched:
        """Queue a pass. The newest tokens of its sequences need not be known if the last pass chooses them.

        Args:
            step: sequences whose blocks suffice for these tokens.
            num_blocks: how many blocks there are in all.
            chooses: whether tokens depend on logits and draws alone, so that the device chooses them by
                itself; otherwise `choose` has to follow, before any other pass.
        """
        self._reserve(step, num_blocks)
        self._rows.update(step.changed)
        launched = Launched(step)
        if step.is_decode:
            self._decode(launched, chooses)
        else:
            self._mixed(launched)
            if chooses:
                self.choose(launched)
        return launched

    def choose(self, launched: Launched, num_logprobs: int | None = None, own: Tensor | None = None) -> None:
        """Choose tokens from the logits of a pass, which may have been changed meanwhile.

        Args:
            launched: the pass.
            num_logprobs: of how many most likely tokens to report log probabilities, besides those of the
                chosen ones; None: report nothing.
            own: the logits that are reported on, if not those that the choice is made from.
        """
        logits, step = launched.logits, launched.step
        tokens: NDArray[Any] | None = None
        newest: Tensor | None = None
        if logits is not None:
            tokens, row = self.passes.ring.take()
            newest = row[: step.num_sampled]
            if all(sequence.params.temperature == 0 for sequence in step.sequences[: step.num_sampled]):
                argmax(logits, out=newest)
            else:
                sample(logits, **launched.draws, out=newest)
            if num_logprobs is not None:
                launched.logprobs = self._logprobs(logits if own is None else own, newest, num_logprobs)
        self._queued(launched, tokens, newest)

    def wait(self, launched: Launched) -> list[int]:
        """Wait until a pass is done; the token of each sampled sequence."""
        began = time.perf_counter()
        tokens = launched.wait()
        self.device_s += time.perf_counter() - began
        return tokens

    def residual(self, step: Step, num_blocks: int) -> Tensor:
        """Process a piece of a prompt, and give what the logits of all its tokens are made from.

        Args:
            step: one sequence, whose blocks suffice for these tokens.
            num_blocks: how many blocks there are in all.

        Returns:
            [num_tokens, D], for `Decoder.logits_of`.
        """
        self._reserve(step, num_blocks)
        self._rows.update(step.sequences)
        batch = self.passes.exact(step)
        batch.upload(step, self._rows, Newest([], None))
        return batch.run()

    def warm_up(self, num_blocks: int, max_num_tokens: int) -> None:
        """Compile all kernels that will be needed, and capture decode steps of all sizes.

        Args:
            num_blocks: how many blocks the cache will ever have.
            max_num_tokens: most tokens of a pass.
        """
        self.passes.warm_up(num_blocks, max_num_tokens)
        device = self.model.device
        ints, floats = (Tensor.zeros((1,), dtype, device) for dtype in (DType.int32, DType.float32))
        logits, bits = (
            self.passes.logits[:1],
            Tensor.zeros((1, -(-self.vocab_size // 32)), DType.int32, device),
        )

        def what_is_not_captured() -> None:
            argmax(logits)
            logprobs(logits, ints, 1)
            pick_tokens(ints, ints, ints)
            penalize(logits, ints, ints, ints, floats, floats, floats)
            bias_logits(logits, ints, ints, floats)
            mask_logits(logits[:, : self.vocab_size], bits)

        device.backend.prepare(what_is_not_captured)

    def reset(self) -> None:
        """Forget what is under way, and wait for it: an exception may have come at any place."""
        self.model.device.synchronize()
        self.passes.ring.reset()
        self._newest, self._following = Newest([], None), None

    # --- the two kinds of passes --------------------------------------------------------------------------

    def _decode(self, launched: Launched, chooses: bool) -> None:
        step, state = launched.step, self.passes.decode(launched.step)
        state.prepare(step, self._rows, self._newest, follows=self._following == (state, step.sequences))
        self._replay(state.graph(("greedy" if state.is_greedy else "sample") if chooses else None))
        count = len(step.sequences)
        if chooses:
            self._queued(launched, *self.passes.ring.of_graph())
            self._following = state, step.sequences
        else:
            launched.logits = self.passes.logits[:count, : self.vocab_size]
            launched.draws = {name: values[:count] for name, values in state.draws.items()}

    def _mixed(self, launched: Launched) -> None:
        step = launched.step
        batch, is_known = self.passes.mixed(step)
        batch.upload(step, self._rows, self._newest)
        if is_known:
            self._replay(batch.graph())
        elif self._is_recorded(step):
            with self.model.device.capture() as graph:
                self._run(launched, batch)
            self._replay(graph)
        else:
            self._run(launched, batch)
        if step.num_sampled:
            launched.logits = self.passes.logits[: step.num_sampled, : self.vocab_size]
            launched.draws = {name: values[: step.num_sampled] for name, values in batch.draws.items()}

    def _run(self, launched: Launched, batch: MixedPass) -> None:
        residual = batch.run()
        self._report(launched, residual)
        if launched.step.num_sampled:
            batch.logits(residual)

    def _is_recorded(self, step: Step) -> bool:
        """Whether the host is to run a pass as a whole."""
        work = sum(step.num_tokens) * self.model.bytes_per_token
        return self.model.device.is_host and work <= RECORDED_WORK and not reports(step)

    def _queued(self, launched: Launched, tokens: NDArray[Any] | None, newest: Tensor | None) -> None:
        launched.complete(self.model.device.backend.record(), tokens)
        self._newest = Newest(launched.step.sequences[: launched.step.num_sampled], newest)
        self._following = None

    def _replay(self, graph: Graph) -> None:
        began = time.perf_counter()
        graph.replay()
        self.device_s += time.perf_counter() - began

    def _reserve(self, step: Step, num_blocks: int) -> None:
        if self.passes.reserve(step.longest, num_blocks):
            self._following = None

    # --- what is reported besides tokens ------------------------------------------------------------------

    def _report(self, launched: Launched, residual: Tensor) -> None:
        """Queue what some sequences of a mixed pass are asked for, besides their next token."""
        step, begin = launched.step, 0
        for sequence, start, count in zip(step.sequences, step.starts, step.num_tokens, strict=True):
            rows = residual[begin : begin + count]
            begin += count
            if sequence.wants_prompt_logprobs:
                self._report_prompt(launched, sequence, start + 1, rows)
            if sequence.embeds and start + count == sequence.num_tokens:
                hidden = self.model.normalized(rows[count - 1 :])
                launched.embeddings.append((sequence, self._outbox.post(hidden)))

    def _report_prompt(self, launched: Launched, sequence: Sequence, place: int, rows: Tensor) -> None:
        """How likely the tokens of a prompt from a place on are; row r is of the token before `place + r`."""
        targets = np.array(sequence.prompt_ids[place : place + rows.shape[0]], np.int32)
        at_once = max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size))
        for first in range(0, len(targets), at_once):
            part = Tensor.from_numpy(targets[first : first + at_once]).to(rows.device)
            logits = self.model.logits_of(rows[first : first + part.shape[0]])[:, : self.vocab_size]
            reads = self._logprobs(logits, part, sequence.params.prompt_logprobs or 0)
            launched.prompt_logprobs.append((sequence, place + first, reads))

    def _logprobs(self, logits: Tensor, token_ids: Tensor, count: int) -> list[Read]:
        return [self._outbox.post(t) for t in logprobs(logits, token_ids, min(count, logits.shape[1]))]
