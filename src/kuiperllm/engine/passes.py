"""Passes by their shapes, those that were captured among them, and the memory that all of them work on."""

from __future__ import annotations

from typing import get_args

from kuiperllm.core import DType, Tensor
from kuiperllm.engine.decode_graph import Choice, DecodeState
from kuiperllm.engine.graphs import Graphs
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.mixed_pass import MixedPass, Shape
from kuiperllm.engine.newest import TokenRing
from kuiperllm.engine.scheduler import Step
from kuiperllm.models import Decoder

_ROTARY_TOKENS = 512  # the table of rotary angles begins with this many positions
_GPU_ROTARY_TOKENS = 8192  # capturing a step anew, as every growth demands, costs a GPU many steps
_GPU_TABLE_TOKENS = 512  # steps are captured for contexts of up to this many tokens, or 4, 16, ... times
_GPU_TABLE_FACTOR = 4

_SIZES = (8, 1), (32, 8), (64, 16), (256, 32)
"""Up to so many sequences, a GPU's decode steps are made for multiples of so many: kernels for up to
8 rows (4 where weights have 16 bits) take each number as it is, others about the same time for a row more."""
_LARGEST_STEP = 64
_MOST_MIXED = 256  # shapes of mixed passes that are kept


class Passes:
    """Decode steps are captured once per batch size, and so are short mixed steps on a GPU.

    Args:
        model: what to run.
        cache: the keys and values of its layers.
        max_num_seqs: most sequences of a step.
        max_model_len: the longest sequence there will be.
        vocab_size: ids below this may be chosen.
    """

    def __init__(
        self, model: Decoder, cache: KVCache, max_num_seqs: int, max_model_len: int, vocab_size: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._is_host = model.device.is_host
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._most = max_num_seqs if self._is_host else padded_size(max_num_seqs)
        self.ring = TokenRing(model.device, self._most)
        """Where tokens are left."""
        shape = self._most, model.lm_head.out_features
        self.logits = Tensor.empty(shape, DType.float32, model.device)
        """Where logits are left, until the next pass."""
        self._states: dict[tuple[int, int], DecodeState] = {}  # by batch size and width of the block table
        self._mixed: dict[Shape, MixedPass] = {}
        self._graphs = Graphs(model.device)
        self._is_prepared = False

    @property
    def widest(self) -> int:
        """The widest block table that a pass can have."""
        return self._fitting_width(-(-self._max_model_len // self._cache.block_size))

    # --- passes -------------------------------------------------------------------------------------------

    def decode(self, step: Step) -> DecodeState:
        """What a decode step works on; the same object for steps of the same shape."""
        size = len(step.sequences)
        return self._state(size if self._is_host else padded_size(size), self._width(step))

    def _state(self, size: int, width: int) -> DecodeState:
        key = size, width
        if key not in self._states:
            self._states[key] = DecodeState(
                self._model, self._cache, *key, self._vocab_size, self.logits, self.ring, self._graphs
            )
        return self._states[key]

    def mixed(self, step: Step) -> tuple[MixedPass, bool]:
        """The pass for any other step, and whether it has been run before, so that it is worth capturing."""
        exact = Shape.of(step, self._width(step))
        shape = None if self._is_host or reports(step) else self._padded(exact)
        if shape is None:
            return self._made(exact), False
        if (known := self._mixed.get(shape)) is not None:
            return known, True
        if len(self._mixed) == _MOST_MIXED:
            del self._mixed[next(iter(self._mixed))]
        self._mixed[shape] = self._made(shape)
        return self._mixed[shape], False

    def exact(self, step: Step) -> MixedPass:
        """A pass for a step of which nothing is padded."""
        return self._made(Shape.of(step, self._width(step)))

    @staticmethod
    def _padded(exact: Shape) -> Shape | None:
        single, sampled = exact.num_single, max(1, exact.num_sampled)
        return exact.padded(padded_size(single) if single else 0, padded_size(sampled))

    def _made(self, shape: Shape) -> MixedPass:
        made = MixedPass(self._model, self._cache, self.logits, self._graphs, shape)
        if not self._is_prepared:
            self._prepare(made)
            self._is_prepared = True
        return made

    def _prepare(self, made: MixedPass) -> None:
        """Compile the kernels of a pass, all at once."""
        self._model.device.backend.prepare(lambda: made.logits(made.run()))

    # --- memory -------------------------------------------------------------------------------------------

    def reserve(self, num_tokens: int, num_blocks: int) -> bool:
        """Make cache and tables large enough; what was captured on smaller ones is thrown away.

        Args:
            num_tokens: of the longest sequence.
            num_blocks: of the cache.

        Returns:
            Whether anything had to grow.
        """
        rotary = self._model.rotary
        if num_blocks <= self._cache.num_blocks and num_tokens <= rotary.num_positions:
            return False
        self._model.device.synchronize()  # nothing may be under way on what is given back
        self._states.clear()  # first: captured steps keep the memory of what is to be replaced
        self._mixed.clear()
        self._graphs.clear()
        self._cache.reserve(num_blocks)
        if num_tokens > rotary.num_positions:
            least = _ROTARY_TOKENS if self._is_host else _GPU_ROTARY_TOKENS
            target = max(2 * rotary.num_positions, -(-num_tokens // least) * least)
            rotary.reserve(min(target, max(num_tokens, self._max_model_len)))
        return True

    def warm_up(self, num_blocks: int, max_num_tokens: int) -> None:
        """Compile kernels of passes; capture decode steps of all sizes for contexts of up to 2048 tokens.

        Args:
            num_blocks: how many blocks the cache will ever have.
            max_num_tokens: most tokens of a mixed pass.
        """
        self.reserve(self._max_model_len, num_blocks)
        sizes, widths = {1, min(2, self._most)}, {1}
        if not self._is_host:
            sizes = {padded_size(count) for count in range(1, self._most + 1)}
            first = self._fitting_width(1)
            widths = {first, min(self._fitting_width(first + 1), self.widest)}
            for num_tokens in (1 << power for power in range(4, max_num_tokens.bit_length())):
                self._prepare(self._made(Shape(num_tokens, 1, 1, 2, num_tokens - 1, first)))
        for size in sorted(sizes):
            for width in widths:
                for choice in get_args(Choice):
                    self._state(size, width).graph(choice)

    def _width(self, step: Step) -> int:
        """The width of the block table, which is one of a few.

        How a context is split between the multiprocessors of a GPU follows from that width, so steps of short
        contexts are captured apart from those of long ones.
        """
        return self._fitting_width(-(-step.longest // self._cache.block_size))

    def _fitting_width(self, num_blocks: int) -> int:
        width, factor = 1, 2
        if not self._is_host:
            width, factor = max(1, _GPU_TABLE_TOKENS // self._cache.block_size), _GPU_TABLE_FACTOR
        while width < num_blocks:
            width *= factor
        return width


def reports(step: Step) -> bool:
    """Whether a piece of a prompt is worked on for more than its next token."""
    pieces = step.sequences[step.num_single :]
    return any(sequence.embeds or sequence.wants_prompt_logprobs for sequence in pieces)


def padded_size(count: int) -> int:
    """The number of rows of a decode step of so many sequences on a GPU, padding included."""
    step = next((step for limit, step in _SIZES if count <= limit), _LARGEST_STEP)
    return -(-count // step) * step
