"""`/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kuiperllm.server.protocol.chat import ResponseFormat
from kuiperllm.server.protocol.common import WHOLE, Answer, SamplingFields, TokenId, Usage

Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompts = str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """A text, or several, to be continued."""

    prompt: Prompts = Field(description="Text or token ids; a list of either is several prompts.")
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31), WHOLE] | None = Field(
        None, description="Default: 16."
    )
    logprobs: Annotated[int, Field(ge=0, le=100), WHOLE] | None = Field(
        None, description="How many of the most likely tokens to name at each place."
    )
    echo: bool | None = Field(
        None, description="Give the prompt in front of its continuation, and its log probabilities."
    )
    best_of: Annotated[int, Field(ge=1, le=128), WHOLE] | None = Field(
        None, description="Make so many and give the best `n`; at least `n`, and not with `stream`."
    )
    suffix: None = Field(None, description="Not supported.")
    response_format: ResponseFormat | None = None


class CompletionLogprobs(Answer):
    """Lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One of the outputs."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: str | int | None = None


class CompletionAnswer(Answer):
    """A whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
