"""How many of an output's tokens are reasoning."""

from __future__ import annotations

from kuiperllm.server.answers.reasoning import CLOSE, OPEN, ThinkingState
from kuiperllm.text import Tokenizer


def reasoning_tokens(tokenizer: Tokenizer, ids: list[int], state: ThinkingState | None) -> int:
    """Tokens up to the mark that ends the reasoning, with it; all of them if it does not come.

    Args:
        tokenizer: the model's.
        ids: the output's tokens.
        state: where the prompt left the model; None if the model's answers have no reasoning.
    """
    if state is None or state == "closed":
        return 0
    seen = b""
    begun = state == "open"
    for count, token_id in enumerate(ids, start=1):
        seen = seen[-2 * len(CLOSE) :] + tokenizer.token_bytes(token_id)
        if not begun:
            start = seen.lstrip()
            if start.startswith(OPEN.encode()):
                begun = True
            elif not OPEN.encode().startswith(start):
                return 0
        if begun and CLOSE.encode() in seen:
            return count
    return len(ids) if begun else 0
