"""How likely a model finds the tokens of a text: its logits at every place, in bounded memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.config import SamplingParams
from kuiperllm.core import Tensor
from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.runner import LOGITS_BYTES, Runner
from kuiperllm.engine.scheduler import Step
from kuiperllm.engine.sequence import Sequence
from kuiperllm.errors import CheckpointError
from kuiperllm.ops.logprobs import logprobs


class Scorer:
    """Runs texts through a model, each by itself and from its beginning.

    All rows of the model's output take part in the probabilities, also those for which the tokenizer has no
    token, as they do in other programs' figures.

    Args:
        runner: runs the model.
        pool: blocks of the runner's cache, which nobody else uses meanwhile.
        max_tokens: most tokens that one pass takes in.
    """

    def __init__(self, runner: Runner, pool: BlockPool, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._runner = runner
        self._pool = pool

    def logprobs(self, ids: list[int], first: int = 1) -> NDArray[np.float64]:
        """The natural logarithm of the probability of each token, given all before it.

        Args:
            ids: token ids, below the size of the vocabulary and no more than the context holds.
            first: place of the first token that is asked about, 1 at least.

        Returns:
            [len(ids) - first].

        Raises:
            CheckpointError: a logit is no finite number.
            OutOfMemoryError: the device has not enough memory.
        """
        device = self._runner.model.device
        parts: list[NDArray[Any]] = []
        with closing(self.logits(ids, first)) as slices:
            for place, logits in slices:
                targets = np.array(ids[place : place + logits.shape[0]], np.int32)
                chosen, _, _ = logprobs(logits, Tensor.from_numpy(targets).to(device), 0)
                parts.append(np.array(chosen.numpy(), np.float64))
        found: NDArray[np.float64] = np.concatenate(parts)
        if not np.isfinite(found).all():
            raise not_finite()
        return found

    def logits(
        self, ids: list[int], first: int = 1, *, max_tokens: int | None = None
    ) -> Generator[tuple[int, Tensor], None, None]:
        """The model's logits, some places at a time.

        Args:
            ids: as for `logprobs`.
            first: as for `logprobs`.
            max_tokens: most tokens that one pass takes in, if not the scorer's own. Two models whose
                vocabularies are of one size give slices of one size if this is the same.

        Yields:
            (place, float32 [S, V]): row r is what the model says about the token at `place + r`. They are
            valid until the next ones are asked for.

        Raises:
            OutOfMemoryError: the device has not enough memory.
        """
        taken_in = ids[:-1]  # of what would follow the last token, nothing is asked
        sequence = Sequence(taken_in, SamplingParams(), seed=0, max_tokens=0, row=0)
        sequence.blocks = self._pool.allocate(self._pool.blocks_for(len(taken_in)))
        at_once = max(1, LOGITS_BYTES // (4 * self._runner.model.config.vocab_size))
        try:
            for begin in range(0, len(taken_in), max_tokens or self.max_tokens):
                count = min(max_tokens or self.max_tokens, len(taken_in) - begin)
                step = Step([sequence], [count], [begin], num_single=0, num_sampled=0)
                residual = self._runner.residual(step, self._pool.num_blocks)
                for row in range(max(0, first - 1 - begin), count, at_once):
                    rows = residual[row : min(count, row + at_once)]
                    yield begin + row + 1, self._runner.model.logits_of(rows)
        finally:
            self._pool.release(sequence.blocks)


def not_finite() -> CheckpointError:
    """What to raise where logits are NaN or infinite."""
    return CheckpointError(
        "the model's logits are not finite numbers: weights may be damaged (kuiper info --check finds that), "
        "or float16 may be too small for what is computed (use --dtype float32)"
    )
