"""Compiles grammars for one model's tokenizer, off the event loop, and keeps those that were used last."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kuiperllm.engine.request import Guide
from kuiperllm.errors import UsageError
from kuiperllm.server.structured.grammar import Grammar
from kuiperllm.server.structured.guide import MatcherGuide, explain
from kuiperllm.server.structured.vocabulary import native_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from kuiperllm.text import Tokenizer

_KEPT = 128
_KEPT_CHARACTERS = 4 << 20
_THREADS = 2
_STACK_BYTES = 256 << 20
"""llguidance follows references by recursion, some kilobytes each. Only what is touched takes memory."""
_PATIENCE_S = 20.0
"""Nobody waits longer for a grammar. The thread goes on, and others have one less."""
_MOST_ITEMS = 10_000  # ways in which an output may go on: objects with 2,000 optional properties have 8,000
_MOST_STATES = 50_000
"""Of the automaton that reads an output's characters; 1 to 2 kB each. Ordinary schemas have some hundred."""


class GrammarCompiler:
    """Makes guides from grammars.

    Args:
        tokenizer: the model's.
        stop_ids: the tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._native: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._pool = _pool_of_deep_threads()

    async def prepare(self) -> None:
        """Read the vocabulary, which takes a second or two if it is large; else the first request does."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self._vocabulary)

    async def compile(self, grammar: Grammar) -> Callable[[], Guide]:
        """What makes a guide for each of a request's outputs.

        Raises:
            UsageError: the grammar is not valid, nothing matches it, or it is too complex.
        """
        text = grammar.text()
        matcher = self._matchers.get(text)
        if matcher is None:
            matcher = await self._in_time(text)
            self._keep(text, matcher)
        else:
            self._matchers.move_to_end(text)
        compiled, vocab_size = matcher, self._tokenizer.vocab_size
        return lambda: MatcherGuide(compiled.deep_copy(), vocab_size)

    def close(self) -> None:
        """End the threads, when what they do now is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_time(self, text: str) -> LLMatcher:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.get_running_loop().run_in_executor(self._pool, self._compile, text)
        except TimeoutError:
            raise UsageError(f"the output's grammar takes longer than {_PATIENCE_S:g} s to compile") from None

    def _keep(self, text: str, matcher: LLMatcher) -> None:
        self._matchers[text] = matcher
        while len(self._matchers) > _KEPT or sum(map(len, self._matchers)) > _KEPT_CHARACTERS:
            self._matchers.popitem(last=False)

    def _compile(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_lexer_states=_MOST_STATES, max_items_in_row=_MOST_ITEMS, verbose_errors=False
        )
        matcher = LLMatcher(self._vocabulary(), text, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out if nothing can be the beginning
        if matcher.is_error():
            raise UsageError(f"the output's grammar cannot be used: {explain(matcher)}")
        return matcher

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._native is None:
                self._native = native_tokenizer(self._tokenizer, self._stop_ids)
            return self._native


def _pool_of_deep_threads() -> ThreadPoolExecutor:
    """A pool that has its threads at once: the size of their stacks is a setting of the whole process."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
    all_there = threading.Barrier(_THREADS + 1)
    before = threading.stack_size(_STACK_BYTES)
    try:
        for _ in range(_THREADS):
            pool.submit(all_there.wait)
        all_there.wait()
    finally:
        threading.stack_size(before)
    return pool
