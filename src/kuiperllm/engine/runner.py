"""Runs the model for the sequences of a step. The only part of the engine that makes tensors."""

from __future__ import annotations

import time
from collections.abc import Callable

from kuiperllm.core import Tensor
from kuiperllm.core.device import Graph
from kuiperllm.engine.decode_graph import Choice, DecodeState
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.prefill import Prefill
from kuiperllm.engine.scheduler import Step
from kuiperllm.models import Decoder

_ROTARY_TOKENS = 512  # the table of rotary angles begins with this many positions
_GPU_ROTARY_TOKENS = 8192  # capturing a step anew, as every growth demands, costs a GPU many steps
_GPU_TABLE_TOKENS = 512  # steps are captured for contexts of up to this many tokens, or 4, 16, ... times


class Runner:
    """Decode steps are captured once per batch size, and so are short prompts on a GPU.

    Args:
        model: what to run.
        cache: the keys and values of its layers.
        max_model_len: the longest sequence there will be.
        vocab_size: ids below this may be chosen (default: all of the model's).
    """

    def __init__(
        self, model: Decoder, cache: KVCache, max_model_len: int, vocab_size: int | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size or model.config.vocab_size
        self._states: dict[tuple[int, int], DecodeState] = {}  # by batch size and width of the block table
        self._prefills: dict[tuple[int, int], Prefill] = {}  # by length and width
        self._prefill_graph: Graph | None = None  # any of them: they all share their memory
        self._is_prepared = False
        self.device_s = 0.0
        """Time that the host spent in captured steps, or waiting for them, so far."""

    def run(self, step: Step, num_blocks: int) -> Tensor | None:
        """Process the tokens of a step.

        Args:
            step: sequences whose blocks suffice for these tokens, all known.
            num_blocks: how many blocks there are in all.

        Returns:
            float32 [S, V], valid until the next call: the logits after the last token of each sequence; None
            in the middle of a prompt.
        """
        self._reserve(step, num_blocks)
        if step.is_decode:
            state = self._state(step)
            self._replay(state.prepare(step.sequences, None))
            logits: Tensor | None = state.logits
        else:
            logits = self._prefill(step)
        for sequence in step.sequences:
            sequence.num_computed += step.num_tokens
        return logits

    def residual(self, step: Step, num_blocks: int) -> Tensor:
        """Process a piece of a prompt, and give what the logits of all its tokens are made from.

        Args:
            step: one sequence, whose blocks suffice for these tokens.
            num_blocks: how many blocks there are in all.

        Returns:
            [num_tokens, D], for `Decoder.logits_of`.
        """
        self._reserve(step, num_blocks)
        (sequence,) = step.sequences
        prefill = Prefill(self.model, self.cache, step.num_tokens, self._key(step)[1])
        prefill.upload(sequence, step.num_tokens)
        self._prepare(prefill)
        residual = prefill.run()
        sequence.num_computed += step.num_tokens
        return residual

    def decode(self, step: Step, num_blocks: int, choice: Choice) -> Callable[[], list[int]]:
        """Queue a decode step that also chooses the next tokens, on the device.

        The newest tokens of the sequences need not be known yet if this step `follows` the one before.

        Args:
            step: a decode step of sequences whose blocks suffice.
            num_blocks: how many blocks there are in all.
            choice: how to choose.

        Returns:
            What waits for the tokens and returns them, one for each sequence; to be called before three more
            steps are queued.
        """
        self._reserve(step, num_blocks)
        state = self._state(step)
        self._replay(state.prepare(step.sequences, choice))
        row = state.chosen_row()
        event = self.model.device.backend.record()
        for sequence in step.sequences:
            sequence.num_computed += 1

        def wait() -> list[int]:
            began = time.perf_counter()
            event.wait()
            self.device_s += time.perf_counter() - began
            tokens: list[int] = state.tokens[row].tolist()
            return tokens

        return wait

    def follows(self, step: Step, num_blocks: int) -> bool:
        """Whether a decode step can be queued before the newest tokens of its sequences are known."""
        state = self._states.get(self._key(step))
        return state is not None and self._has_room(step, num_blocks) and state.follows(step.sequences)

    def _has_room(self, step: Step, num_blocks: int) -> bool:
        """Whether the cache and the table of angles are large enough for a step."""
        tokens = max(sequence.num_computed for sequence in step.sequences) + step.num_tokens
        return num_blocks <= self.cache.num_blocks and tokens <= self.model.rotary.num_positions

    def _key(self, step: Step) -> tuple[int, int]:
        """How many sequences, and the width of their block table, which is one of a few.

        How a context is split between the multiprocessors of a GPU follows from that width, so steps of short
        contexts are captured apart from those of long ones.
        """
        needed = max(len(sequence.blocks) for sequence in step.sequences)
        width, factor = 1, 2
        if not self.model.device.is_host:
            width, factor = max(1, _GPU_TABLE_TOKENS // self.cache.block_size), 4
        while width < needed:
            width *= factor
        return len(step.sequences), width

    def _replay(self, graph: Graph) -> None:
        started = time.perf_counter()
        graph.replay()
        self.device_s += time.perf_counter() - started

    def _state(self, step: Step) -> DecodeState:
        key = self._key(step)
        if key not in self._states:
            self._states[key] = DecodeState(self.model, self.cache, *key, self.vocab_size)
        return self._states[key]

    def _reserve(self, step: Step, num_blocks: int) -> None:
        """Make cache and tables large enough; what was captured on smaller ones is thrown away."""
        if self._has_room(step, num_blocks):
            return
        tokens = max(sequence.num_computed for sequence in step.sequences) + step.num_tokens
        positions = self.model.rotary.num_positions
        self._states.clear()  # first: captured steps keep the memory of what is to be replaced
        self._prefills.clear()
        self._prefill_graph = None
        self.cache.reserve(num_blocks)
        if tokens > positions:
            least = _ROTARY_TOKENS if self.model.device.is_host else _GPU_ROTARY_TOKENS
            target = max(2 * positions, -(-tokens // least) * least)
            self.model.rotary.reserve(min(target, max(tokens, self.max_model_len)))

    def _prefill(self, step: Step) -> Tensor | None:
        (sequence,), num_tokens = step.sequences, step.num_tokens
        length = None if self.model.device.is_host else Prefill.captured_length(num_tokens)
        width = self._key(step)[1]
        prefill = self._prefills.get((length, width)) if length is not None else None
        is_known = prefill is not None
        if prefill is None:
            prefill = Prefill(self.model, self.cache, length or num_tokens, width)
        prefill.upload(sequence, num_tokens)
        is_end = sequence.num_computed + num_tokens == sequence.num_tokens
        if is_known:
            if prefill.captured is None:
                prefill.capture(self._prefill_graph)
            assert prefill.captured is not None
            self._prefill_graph, logits = prefill.captured
            self._prefill_graph.replay()
            return logits if is_end else None
        if length is not None:
            self._prefills[length, width] = prefill  # if the length comes again, it is worth capturing
        self._prepare(prefill)
        residual = prefill.run()
        return prefill.logits(residual) if is_end else None

    def _prepare(self, prefill: Prefill) -> None:
        """Compile the kernels of a pass, all at once, before the first one."""
        if not self._is_prepared:
            self.model.device.backend.prepare(lambda: prefill.logits(prefill.run()))
            self._is_prepared = True
