"""Models, embeddings, tokens, health."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from kuiperllm.server.protocol.chat import Message, Tool
from kuiperllm.server.protocol.common import WHOLE, Answer, Request, ShortText, TokenId
from kuiperllm.server.protocol.completions import Prompts


class ModelCard(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int = Field(description="Longest prompt and output together, in tokens.")
    chat: bool = Field(description="Whether there is a chat template, which chat completions need.")


class ModelList(Answer):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class EmbeddingRequest(Request):
    """Texts to be turned into vectors."""

    input: Prompts
    model: ShortText | None = None
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`base64`: of float32 numbers, the low byte first."
    )
    dimensions: Annotated[int, Field(ge=1, lt=1 << 20), WHOLE] | None = Field(
        None,
        description="Only the model's own number is possible.",
        json_schema_extra={"x-only": "hidden_size"},
    )
    user: ShortText | None = Field(None, description="Without effect.")


class Embedding(Answer):
    """A vector of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Tokens taken in."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Answer):
    """One vector for each text."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class TokenizeRequest(Request):
    """A text, or a conversation, to be cut into tokens; exactly one of the two."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: ShortText | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Begin with the token that begins a text. Default: as the tokenizer does."
    )
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(Answer):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Request):
    """Tokens to be turned into text."""

    model: ShortText | None = None
    tokens: list[TokenId]


class DetokenizeAnswer(Answer):
    """The text of some tokens, special ones included."""

    prompt: str


class Health(Answer):
    """How the server is."""

    status: Literal["ok", "failed", "stopping"]
