"""Shows a generation while it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kuiperllm.cli.output import write
from kuiperllm.cli.progress import Reporter
from kuiperllm.errors import KuiperError

if TYPE_CHECKING:
    from kuiperllm.engine.output import Chunk, Completion
    from kuiperllm.text import Tokenizer


def show_stream(chunks: Iterator[Chunk], reporter: Reporter, show: Callable[[Chunk], str]) -> Completion:
    """Print what `show` makes of each chunk as it comes; the completion that the last one holds.

    An interruption ends the line that was begun.
    """
    started = False
    try:
        for chunk in chunks:
            if not started:
                reporter.text_follows()
            started = True
            write(show(chunk))
            if chunk.completion is not None:
                return chunk.completion
    except KeyboardInterrupt:
        if started:
            write("\n")
        raise
    raise KuiperError("the generation ended without a result")


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text on its own; what is not UTF-8 becomes U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def speed(completion: Completion) -> str:
    """How fast a text was made, in one line."""
    prompt, new = len(completion.prompt_token_ids), len(completion.token_ids)
    return (
        f"{prompt} prompt tokens, {new} new tokens: first after "
        f"{completion.time_to_first_token_s * 1e3:.0f} ms, then {completion.decode_tokens_per_s:.1f} tokens/s"
    )
