"""A grammar with its state in one output, as the engine wants it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kuiperllm.errors import UsageError
from kuiperllm.text.tokenizer import one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher

_PLACE = re.compile(r"^(at )?1\(8\): (failed to compile JSON schema: )?")
"""Where the first rule begins: true of what was not written as a grammar, and of no use."""


class MatcherGuide:
    """Says which tokens may come next: see `kuiperllm.engine.request.Guide`.

    Args:
        matcher: knows the grammar; belongs to this guide alone.
        vocab_size: of the tokenizer that the matcher knows.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def fill(self, bits: NDArray[np.int32]) -> None:
        """See `Guide`; what is beyond the tokenizer's ids may not come.

        Raises:
            UsageError: the grammar became too complex here.
        """
        if bits.size == self._words and bits.flags.c_contiguous:
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        else:
            mask = np.empty(self._words, np.int32)
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            common = min(bits.size, mask.size)
            bits[:common] = mask[:common]
            bits[common:] = 0
        self._check()

    def accept(self, token_id: int) -> None:
        """See `Guide`. Raises like `fill`."""
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_complete(self) -> bool:
        """See `Guide`."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the output's grammar cannot be followed any further: {explain(self._matcher)}")


def explain(matcher: LLMatcher) -> str:
    """What is wrong, in one line, without the library's own state."""
    text = matcher.get_error().split("<state>")[0].split("<backtrace>")[0].split("<non-verbose")[0]
    if text.startswith("NoExtension"):
        return "nothing matches it"
    first, *rest = text.splitlines() or ["it is too complex"]
    found = [first, *(line for line in rest if line.startswith("error:"))]  # between them the grammar itself
    return one_line(_PLACE.sub("", " ".join(found)), 300)
